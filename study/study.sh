#!/usr/bin/env bash
# Does deep supervision help, and in which blocks? Every command, from pre-training to the report.
#
#     bash study/study.sh data/cifar10 --size hour   # one seed, MAE and DeepMIM, blocks
#     bash study/study.sh data/cifar10               # small: most of questions 1 to 6, nine hours
#     bash study/study.sh data/cifar10 --size day    # then the rest of 1 to 7, some 14 more
#     bash study/study.sh data/cifar10 --size targets   # what decoders are asked for, seed 0
#     bash study/study.sh data/cifar10 --size full   # preset cifar10, 100 epochs, a GPU; not tried
#     bash study/study.sh shapes --size smoke        # minutes, to try it; its numbers mean nothing
#     bash study/study.sh data/cifar10 --print       # the commands, without running them
#
# DATA is what --data of the scripts takes, with classes: for small, day and full 50,000 training
# images, for targets 10,000. Runs go into runs/study/SIZE, those of a day into small's, those of an
# hour into runs/study/hour-DATA, each with its report in report/. The same command goes on after an
# interruption: what has a result is skipped, even if other options made it, and a run that was cut
# continues. What is there after an early stop is a smaller study: seed 0, then seed 1, and so on.
# PYTHON=… names another python.
set -euo pipefail

fail() {
    echo "study.sh: $1; usage: study.sh DATA [--size SIZE] [--print]" >&2
    exit 2
}

DATA='' SIZE=small PRINT=''
while [ $# -gt 0 ]; do
    case $1 in
        --size) SIZE=${2-}; shift ;;
        --print) PRINT=yes ;;
        -*) fail "$1 is no option" ;;
        *) DATA=$1 ;;
    esac
    shift || true
done
if [ -z "$DATA" ]; then fail "DATA is missing"; fi
if [ "$DATA" != shapes ] && [ "$DATA" != cifar10 ]; then
    if [ ! -d "$DATA" ]; then fail "$DATA is neither shapes nor cifar10 nor a directory"; fi
    DATA=$(CDPATH='' cd "$DATA" && pwd -P)
fi
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
RUNS=runs/study/$SIZE

# CUT, PARTIAL and REINIT are numbers of blocks, LABELS and MANY of labels. SHAPE and DEEP are
# options of the model, SOME of an analysis.
SEEDS="0 1 2" EPOCHS=8 LABELS=10000 MANY=50000 EVERY=1
CUT="6 8 10 12" PARTIAL="1 2 4 8 12" REINIT="2 4 6 8"
TAPS="10,12 8,10,12 3,6,9,12"
SHAPE='' DEEP='' SOME="--images 10000"
TRAIN="--preset cifar10-nano" TUNE="--preset cifar10-nano --epochs 5"
case $SIZE in
    hour) SEEDS=0 RUNS+=-$(basename "$DATA") ;;
    small) ;;
    day) RUNS=runs/study/small ;;
    targets) EPOCHS=2 ;;
    full) TRAIN="--preset cifar10 --compile" TUNE="--preset cifar10" EPOCHS=100 EVERY=10 ;;
    smoke)
        SHAPE="--dim 16 --depth 3 --heads 2" DEEP="--taps 1,2,3" SOME="--images 20"
        TRAIN="--decoder-dim 8 --decoder-heads 2 --limit 40 --batch-size 20"
        TUNE="--batch-size 20 --epochs 2"
        SEEDS=0 EPOCHS=2 LABELS=20 MANY=40
        CUT="2 3" PARTIAL="1 3" REINIT="1 2" TAPS="1,3" ;;
    *) fail "--size is hour, small, day, targets, full or smoke, not '$SIZE'" ;;
esac
LAST=${CUT##* }
if [ "$DATA" = shapes ] && [ $MANY = 50000 ]; then MANY=10000; fi  # there are no more

if [ "$PRINT" ]; then
    DATA=$(printf %q "$DATA") RUNS=$(printf %q "$RUNS")
else
    mkdir -p "$RUNS"
    before=$(cat "$RUNS/data.txt" 2>/dev/null || echo "$DATA")
    if [ "$before" != "$DATA" ]; then fail "$RUNS holds a study of $before; move it away"; fi
    echo "$DATA" > "$RUNS/data.txt"
fi

run() {  # run FILE COMMAND …, unless FILE, which the command writes at its end, is there
    if [ "$PRINT" ]; then
        echo "${*:2}"
    elif [ ! -e "$1" ]; then
        echo "+ ${*:2}"
        "${@:2}"
    fi
}

train() {  # train ARM SEED OPTION …
    run "$RUNS/$1-$2/result.json" "$PYTHON" train.py $TRAIN $SHAPE --data "$DATA" --seed "$2" \
        --epochs $EPOCHS "${@:3}" --out "$RUNS/$1-$2"
}

tune() {  # tune ARM SEED NAME OPTION …
    run "$RUNS/$1-$2/$3/result.json" "$PYTHON" finetune.py $TUNE --data "$DATA" --seed "$2" \
        --init "$RUNS/$1-$2/model.pt" --limit $LABELS "${@:4}" --out "$RUNS/$1-$2/$3"
}

look() {  # look OUT COMMAND MODEL …, in $RUNS
    local models=("${@:3}")
    run "$RUNS/$1/$2.png" "$PYTHON" analyze.py "$2" "${models[@]/#/$RUNS/}" --data "$DATA" $SOME \
        --out "$RUNS/$1"
}

whole() {  # whole ARM SEED: fine-tune the whole encoder
    tune $1 $2 cut-$LAST --keep-blocks $LAST
}

parts() {  # parts ARM SEED: fine-tune the last blocks only, or start them again at random
    for k in $PARTIAL; do tune $1 $2 partial-$k --trainable-blocks $k; done
    for k in $REINIT; do tune $1 $2 reinit-$k --reinit-blocks $k; done
}

report() {
    run '' "$PYTHON" -m study.report "$RUNS" --out "$RUNS/report"
}

# All arms of a seed start from the same encoder and see the same images and masks.
random() {
    train random "$1" --method mae --epochs 1 --limit 64 --batch-size 64 --lr 1e-30
}

# Each target with one decoder and with four. Teachers are the MAE and, as an upper bound, the same
# fine-tuned on labels.
if [ $SIZE = targets ] || [ $SIZE = smoke ]; then
    mae=$RUNS/mae-0 arms='random mae deepmim' models=()
    random 0
    train mae 0 --method mae --keep-every $EVERY
    train deepmim 0 $DEEP --keep-every $EVERY
    whole mae 0
    for target in hog features labels; do
        case $target in
            hog) asked="--target hog" ;;
            features) asked="--target features --teacher $mae/model.pt" ;;
            labels) asked="--target features --teacher $mae/cut-$LAST/model.pt" ;;
        esac
        train mae-$target 0 --method mae $asked
        train deepmim-$target 0 $DEEP $asked
        arms+=" mae-$target deepmim-$target"
    done
    train hybrid 0 $DEEP --teacher $mae/model.pt
    for arm in $arms hybrid; do
        whole $arm 0; models+=("$arm-0/model.pt")
    done
    look targets blocks "${models[@]}"
fi
if [ $SIZE = targets ]; then report; exit; fi

for seed in $SEEDS; do
    mae=mae-$seed/model.pt deepmim=deepmim-$seed/model.pt
    random $seed
    train mae $seed --method mae --keep-every $EVERY
    train deepmim $seed $DEEP --keep-every $EVERY
    look compare-$seed blocks $mae $deepmim random-$seed/model.pt
    if [ $SIZE = hour ]; then report; exit; fi

    for arm in mae deepmim; do
        for k in $CUT; do tune $arm $seed cut-$k --keep-blocks $k; done
    done
    look compare-$seed cka $mae $deepmim random-$seed/model.pt
    look compare-$seed heads $mae $deepmim random-$seed/model.pt
    look compare-$seed cross-cka $mae $deepmim
    others=(shallow)
    train shallow $seed $DEEP --decoder-depth 1
    if [ $seed = 0 ]; then
        others+=(hybrid)
        train hybrid 0 $DEEP --teacher $RUNS/$mae
        for arm in mae deepmim; do
            kept=$(seq -f "$arm-0/epoch-%g.pt" $EVERY $EVERY $EPOCHS)
            look $arm-0/epochs blocks $kept
            parts $arm 0
        done
    fi
    look others-$seed blocks "${others[@]/%/-$seed/model.pt}"
    for arm in random "${others[@]}"; do whole $arm $seed; done
    report
done

# The yardstick for CKA: two encoders of one method that differ only by chance.
if [ "$SEEDS" != 0 ]; then
    for arm in mae deepmim; do
        look seeds-$arm cross-cka $arm-0/model.pt $arm-1/model.pt
    done
fi
if [ $SIZE = small ]; then report; exit; fi

# What DeepMIM's parts are worth, and AdamW at the same steps.
ablation=()
for taps in $TAPS; do
    train taps-${taps//,/-} 0 --taps $taps; ablation+=("taps-${taps//,/-}-0/model.pt")
done
train depth-2 0 $DEEP --decoder-depth 2; ablation+=(depth-2-0/model.pt)
train mae-adamw 0 --method mae --optimizer adamw --lr 1e-3
train deepmim-adamw 0 $DEEP --optimizer adamw --lr 1e-3
look ablation-0 blocks "${ablation[@]}" mae-adamw-0/model.pt deepmim-adamw-0/model.pt
for arm in mae deepmim; do tune $arm 0 labels-$MANY --limit $MANY; done

# As many epochs of MAE as cost what DeepMIM's did, by the seconds in both logs, and of DeepMIM with
# both depths of decoders as many as that. Then the other seeds of what takes longest.
ask=("$PYTHON" -m study.report --equal-epochs "$RUNS/mae-0" "$RUNS/deepmim-0")
if [ "$PRINT" ]; then equal="\$(${ask[*]})"; else equal=$("${ask[@]}"); fi
for seed in $SEEDS; do
    train mae-long $seed --method mae --epochs "$equal"
    if [ $seed = 0 ]; then
        others='mae-long deepmim-long shallow-long'
        train deepmim-long 0 $DEEP --epochs "$equal"
        train shallow-long 0 $DEEP --decoder-depth 1 --epochs "$equal"
    else
        others='mae-long hybrid'
        train hybrid $seed $DEEP --teacher $RUNS/mae-$seed/model.pt
        for arm in mae deepmim; do parts $arm $seed; done
    fi
    for arm in $others; do
        look $arm-$seed/probe blocks $arm-$seed/model.pt
        whole $arm $seed
    done
done
report
