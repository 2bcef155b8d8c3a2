#!/usr/bin/env bash
# Does deep supervision help? Every command, from pre-training to the report.
#
#     bash study/study.sh cifar10                    # small: cifar10-nano, two days on two cores
#     bash study/study.sh data/cifar10 --size full   # preset cifar10, three seeds, a GPU
#     bash study/study.sh shapes --size smoke        # minutes, to try it; its numbers mean nothing
#     bash study/study.sh cifar10 --print            # the commands, without running them
#
# DATA is what --data of the scripts takes. Runs go into runs/study/SIZE, the report of size small
# into study and of others into runs/study/SIZE/report. The same command goes on after an
# interruption: what has its result is skipped, and a run that was cut continues. It stops at the
# first command that fails. PYTHON=… names another python.
set -euo pipefail

fail() {
    echo "study.sh: $1; usage: study.sh DATA [--size full|small|smoke] [--print]" >&2
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
    DATA=$(realpath "$DATA")
fi
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
RUNS=runs/study/$SIZE
REPORT=$RUNS/report

# SEEDS are seed:epochs of pre-training. TUNED seeds are fine-tuned and probed; of VARIED ones K
# blocks are trained or started again. DEEP, SIZES, PROBE and FEW are further options: of DeepMIM,
# random weights, frozen encoders and fewer labels.
PARTIAL="0 1 2 4 6 8 10 12" REINIT="1 2 4 6 8 10" BLOCK=8 IMAGES=10000 LABELS="10000 50000"
TAPS="12 10,12 8,10,12 6,8,10,12 3,6,9,12" SHORT=30
DEEP='' SIZES='' PROBE='' FEW=''
case $SIZE in
    full)
        TRAIN="--preset cifar10" TUNE="--preset cifar10"
        SEEDS="0:400 1:400 2:400" TUNED="0 1 2" VARIED="0 1 2" ;;
    small)
        TRAIN="--preset cifar10-nano --optimizer adamw --batch-size 256 --lr 1.5e-3"
        TUNE="--preset cifar10-nano" FEW="--epochs 10"
        SEEDS="0:100 1:30 2:30" TUNED="0 1 2" VARIED="0" REPORT=study ;;
    smoke)
        SIZES="--dim 16 --depth 3 --heads 2" DEEP="--taps 1,2,3" PROBE="--limit 40"
        TRAIN="--preset shapes $SIZES --decoder-dim 8 --decoder-depth 1 --decoder-heads 2"
        TRAIN="$TRAIN --limit 40 --batch-size 20"
        TUNE="--preset shapes --batch-size 20 --epochs 1 --warmup-epochs 0"
        SEEDS="0:2 1:2" TUNED="0" VARIED="0"
        PARTIAL="0 3" REINIT="1 2" BLOCK=2 IMAGES=20 LABELS="20 40" TAPS="3 1,3" SHORT=1 ;;
    *) fail "--size is full, small or smoke, not '$SIZE'" ;;
esac
FEWER=${LABELS%% *}

if [ "$PRINT" ]; then
    DATA=$(printf %q "$DATA")
else
    mkdir -p "$RUNS"
    before=$(cat "$RUNS/data.txt" 2>/dev/null || echo "$DATA")
    if [ "$before" != "$DATA" ]; then fail "$RUNS holds a study of $before, not of $DATA"; fi
    echo "$DATA" > "$RUNS/data.txt"
fi

among() { case " $2 " in *" $1 "*) true ;; *) false ;; esac; }

run() {  # run FILE COMMAND …, unless FILE, which the command writes at its end, is there
    if [ "$PRINT" ]; then
        echo "${*:2}"
    elif [ ! -e "$1" ]; then
        echo "+ ${*:2}"
        "${@:2}"
    fi
}

train() {  # train ARM SEED EPOCHS OPTION …
    local out=$RUNS/$1-$2
    run "$out/result.json" $PYTHON train.py $TRAIN --data "$DATA" --seed "$2" --epochs "$3" \
        "${@:4}" --out "$out"
}

tune() {  # tune ARM SEED NAME OPTION …
    local out=$RUNS/$1-$2/$3 start="--init $RUNS/$1-$2/model.pt"
    if [ "$1" = scratch ]; then start="--scratch $SIZES"; fi
    run "$out/result.json" $PYTHON finetune.py $TUNE --data "$DATA" --seed "$2" $start \
        "${@:4}" --out "$out"
}

judge() {  # judge ARM SEED LABELS …: frozen, and fine-tuned on each number of labels
    tune "$1" "$2" knn --knn $PROBE
    tune "$1" "$2" linear-probe --linear-probe $PROBE
    for labels in ${@:3}; do
        if [ "$labels" = "$FEWER" ]; then recipe=$FEW; else recipe=''; fi
        tune "$1" "$2" "finetune-$labels" --limit "$labels" $recipe
    done
}

look() {  # look OUT COMMAND MODEL …
    run "$RUNS/$1/$2.png" $PYTHON analyze.py "$2" "${@:3}" --data "$DATA" --images $IMAGES \
        --out "$RUNS/$1"
}

# The arms. Those of a seed have the same order of images, masks and initial encoder.
for pair in $SEEDS; do
    seed=${pair%:*} epochs=${pair#*:}
    mae=$RUNS/mae-$seed deepmim=$RUNS/deepmim-$seed
    train mae "$seed" "$epochs" --method mae
    train deepmim "$seed" "$epochs" $DEEP
    train hybrid "$seed" "$epochs" $DEEP --teacher "$mae/model.pt"
    # As many epochs of MAE as cost what DeepMIM's did, by the seconds in both logs.
    equal="$PYTHON -m study.report --equal-epochs $mae $deepmim"
    if [ "$PRINT" ]; then equal="\$($equal)"; else equal=$($equal); fi
    train mae-equal "$seed" "$equal" --method mae
    if among "$seed" "$TUNED"; then
        for arm in scratch mae deepmim hybrid mae-equal; do judge $arm "$seed" $LABELS; done
    fi
    if among "$seed" "$VARIED"; then
        for arm in mae deepmim; do
            for k in $PARTIAL; do
                tune $arm "$seed" partial-$k --trainable-blocks $k --limit "$FEWER" $FEW
            done
            for k in $REINIT; do
                tune $arm "$seed" reinit-$k --reinit-blocks $k --limit "$FEWER" $FEW
            done
        done
    fi
    look "compare-$seed" cka "$mae/model.pt" "$deepmim/model.pt"
    look "compare-$seed" cross-cka "$mae/model.pt" "$deepmim/model.pt" --block $BLOCK
    look "compare-$seed" heads "$mae/model.pt" "$deepmim/model.pt"
    last="${previous-} $seed" previous=$seed
done

# The yardstick for CKA: two encoders that differ only by chance, of the last two seeds, which were
# trained equally long.
for arm in mae deepmim; do
    set -- $last
    look seeds-$arm cross-cka "$RUNS/$arm-$1/model.pt" "$RUNS/$arm-$2/model.pt" --block $BLOCK
done

# Where the decoders stand.
for taps in $TAPS; do
    train "taps-${taps//,/-}" 0 $SHORT --taps "$taps"
    judge "taps-${taps//,/-}" 0 "$FEWER"
done

run '' $PYTHON -m study.report "$RUNS" --out "$REPORT"
