#!/usr/bin/env bash
# The study: does deep supervision help? Every command, in order, from pre-training to tables and figures.
#
#     results/study.sh cifar10                        # small: preset cifar10-nano, two cores, about two days
#     results/study.sh data/cifar10 --size full       # preset cifar10, three seeds, a GPU
#     results/study.sh shapes --size smoke            # whether everything works, in minutes; its numbers mean nothing
#     results/study.sh cifar10 --print                # the commands, without running them
#
# DATA is what --data of the scripts takes. Runs go into runs/study/SIZE, the report of size small into results and of others
# into runs/study/SIZE/report. The same command goes on after an interruption: what has its result is skipped, and a run
# that was cut continues. It stops at the first command that fails. PYTHON=… names another python.
set -euo pipefail

usage="usage: results/study.sh DATA [--size full|small|smoke] [--print]"
DATA='' SIZE=small PRINT=''
while [ $# -gt 0 ]; do
    case $1 in
        --size) SIZE=${2-}; shift ;;
        --print) PRINT=yes ;;
        -*) echo "study.sh: $1 is no option; $usage" >&2; exit 2 ;;
        *) DATA=$1 ;;
    esac
    shift || true
done
if [ -z "$DATA" ]; then echo "study.sh: DATA is missing; $usage" >&2; exit 2; fi
if [ "$DATA" != shapes ] && [ "$DATA" != cifar10 ]; then
    if [ ! -d "$DATA" ]; then echo "study.sh: $DATA is neither shapes nor cifar10 nor a directory; $usage" >&2; exit 2; fi
    DATA=$(realpath "$DATA")
fi
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
RUNS=runs/study/$SIZE
REPORT=$RUNS/report

# SEEDS are seed:epochs of pre-training. TUNED seeds are fine-tuned and probed; VARIED ones with K blocks trained or started again.
PARTIAL="0 1 2 4 6 8 10 12" REINIT="1 2 4 6 8 10" BLOCK=8 IMAGES=10000 LABELS="10000 50000"
TAPS="12 10,12 8,10,12 6,8,10,12 3,6,9,12" SHORT=30
DEEP='' SIZES='' PROBE='' FEW=''  # what a size adds: to DeepMIM, random weights, frozen encoders, fewer labels
case $SIZE in
    full)
        TRAIN="--preset cifar10" TUNE="--preset cifar10"
        SEEDS="0:400 1:400 2:400" TUNED="0 1 2" VARIED="0 1 2" ;;
    small)
        TRAIN="--preset cifar10-nano --batch-size 256 --lr 1.5e-3" TUNE="--preset cifar10-nano" FEW="--epochs 10"
        SEEDS="0:100 1:30 2:30" TUNED="0 1 2" VARIED="0" REPORT=results ;;
    smoke)
        SIZES="--dim 16 --depth 3 --heads 2" DEEP="--taps 1,2,3" PROBE="--limit 40"
        TRAIN="--preset shapes $SIZES --decoder-dim 8 --decoder-depth 1 --decoder-heads 2 --limit 40 --batch-size 20"
        TUNE="--preset shapes --batch-size 20 --epochs 1 --warmup-epochs 0"
        SEEDS="0:2 1:2" TUNED="0" VARIED="0"
        PARTIAL="0 3" REINIT="1 2" BLOCK=2 IMAGES=20 LABELS="20 40" TAPS="3 1,3" SHORT=1 ;;
    *) echo "study.sh: --size is full, small or smoke, not '$SIZE'" >&2; exit 2 ;;
esac
FEWER=${LABELS%% *}

if [ "$PRINT" ]; then
    DATA=$(printf %q "$DATA")
else
    mkdir -p "$RUNS"
    if [ "$(cat "$RUNS/data.txt" 2>/dev/null || echo "$DATA")" != "$DATA" ]; then
        echo "study.sh: $RUNS holds a study of $(cat "$RUNS/data.txt"), not of $DATA; move it away first" >&2; exit 2
    fi
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
    run "$RUNS/$1-$2/result.json" $PYTHON train.py $TRAIN --data "$DATA" --seed "$2" --epochs "$3" "${@:4}" --out "$RUNS/$1-$2"
}

tune() {  # tune ARM SEED NAME OPTION …
    local start="--init $RUNS/$1-$2/model.pt"
    if [ "$1" = scratch ]; then start="--scratch $SIZES"; fi
    run "$RUNS/$1-$2/$3/result.json" $PYTHON finetune.py $TUNE --data "$DATA" --seed "$2" $start "${@:4}" --out "$RUNS/$1-$2/$3"
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
    run "$RUNS/$1/$2.png" $PYTHON analyze.py "$2" "${@:3}" --data "$DATA" --images $IMAGES --out "$RUNS/$1"
}

# 1, 2: the arms. A seed's arms have the same order of images, masks and initial encoder.
for pair in $SEEDS; do
    seed=${pair%:*} epochs=${pair#*:}
    mae=$RUNS/mae-$seed deepmim=$RUNS/deepmim-$seed
    train mae "$seed" "$epochs" --method mae
    train deepmim "$seed" "$epochs" $DEEP
    train hybrid "$seed" "$epochs" $DEEP --teacher "$mae/model.pt"
    # As many epochs of MAE as cost what DeepMIM's did, from the seconds in both logs, which a finished run no longer changes.
    if [ "$PRINT" ]; then equal="\$($PYTHON report.py $mae $deepmim)"; else equal=$($PYTHON report.py "$mae" "$deepmim"); fi
    train mae-equal "$seed" "$equal" --method mae
    if among "$seed" "$TUNED"; then
        for arm in scratch mae deepmim hybrid mae-equal; do judge $arm "$seed" $LABELS; done
    fi
    if among "$seed" "$VARIED"; then  # 3, 4: partial and re-initialised fine-tuning, on the fewer labels
        for arm in mae deepmim; do
            for k in $PARTIAL; do tune $arm "$seed" partial-$k --trainable-blocks $k --limit "$FEWER" $FEW; done
            for k in $REINIT; do tune $arm "$seed" reinit-$k --reinit-blocks $k --limit "$FEWER" $FEW; done
        done
    fi
    # 5: what is inside
    look "compare-$seed" cka "$mae/model.pt" "$deepmim/model.pt"
    look "compare-$seed" cross-cka "$mae/model.pt" "$deepmim/model.pt" --block $BLOCK
    look "compare-$seed" heads "$mae/model.pt" "$deepmim/model.pt"
    last="${before-} $seed" before=$seed
done

# The yardstick for CKA: two encoders that differ in nothing but chance, the last two seeds, which were trained equally long.
for arm in mae deepmim; do
    set -- $last
    look seeds-$arm cross-cka "$RUNS/$arm-$1/model.pt" "$RUNS/$arm-$2/model.pt" --block $BLOCK
done

# 7: where the decoders stand.
for taps in $TAPS; do
    train "taps-${taps//,/-}" 0 $SHORT --taps "$taps"
    judge "taps-${taps//,/-}" 0 "$FEWER"
done

run '' $PYTHON analyze.py report "$RUNS" --out "$REPORT"
