#!/usr/bin/env bash
# What one GPU makes of preset cifar10: speed, then MAE and DeepMIM at full length, fine-tuned.
#
#     bash benchmarks/gpu.sh data/cifar10 runs/gpu
#
# DATA is what --data takes. EPOCHS=… shortens pre-training, PYTHON=… names another python. The same
# command goes on after an interruption. OUT/kept holds what is worth keeping: figures, logs,
# pictures, and both models in half precision, about 30 MB.
set -euo pipefail
if [ $# != 2 ]; then echo "usage: bash benchmarks/gpu.sh DATA OUT" >&2; exit 2; fi
DATA=$1
if [ "$DATA" != shapes ] && [ "$DATA" != cifar10 ]; then
    DATA=$(CDPATH='' cd "$DATA" && pwd -P)
fi
mkdir -p "$2/kept"
OUT=$(CDPATH='' cd "$2" && pwd -P)
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} EPOCHS=${EPOCHS:-400}
RECIPE=(--preset cifar10 --data "$DATA" --compile)

keep() {  # keep RUN: what came of it
    for file in log.jsonl result.json reconstruction.png curves.png epoch-$EPOCHS.pt; do
        if [ -e "$OUT/$1/$file" ]; then cp "$OUT/$1/$file" "$OUT/kept/$1-$file"; fi
    done
}

for what in pretrain compile optimizer; do
    if [ ! -e "$OUT/kept/$what.json" ]; then
        "$PYTHON" -m benchmarks.$what --sizes tiny --batch-size 1024 --out "$OUT/kept" \
            || [ $? != 130 ]  # a benchmark that fails stops nothing, Ctrl-C all
    fi
done
for method in mae deepmim; do
    "$PYTHON" train.py "${RECIPE[@]}" --method $method --epochs "$EPOCHS" --keep-every "$EPOCHS" \
        --out "$OUT/$method"
    keep $method
done
for method in mae deepmim; do
    "$PYTHON" finetune.py "${RECIPE[@]}" --init "$OUT/$method/model.pt" --out "$OUT/$method-tuned"
    keep $method-tuned
done
"$PYTHON" analyze.py blocks "$OUT/mae/model.pt" "$OUT/deepmim/model.pt" --data "$DATA" \
    --out "$OUT/kept"
