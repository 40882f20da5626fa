#!/usr/bin/env bash
# What needs a card, in about ten minutes: the tests marked `cuda`, a step beside a plain composition, a published recipe with its memory.
# Rows go to data/results/bench.csv with the name of the card. DEVICE=cpu tries the script itself, with small sizes.
set -euo pipefail
cd "$(dirname "$0")/.."
export CUBLAS_WORKSPACE_CONFIG=:4096:8 MPLBACKEND=Agg HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
DEVICE=${DEVICE:-cuda}
if [ "$DEVICE" = cuda ]; then
    python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "No card is seen by torch: nothing can be tried here.")'
    python -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
    archs="mit_b0 mit_b5"; size=512; turns=5; steps=30; rows=data/results/bench.csv; which=cuda; recipe="--preset pipa_daformer --net daformer --arch mit_b5"
else
    archs=mit_b0; size=64; turns=1; steps=3; rows=$(mktemp -d)/bench.csv; which="not cuda and not slow"; recipe="--size 64x64 --crop 64x64 --start 1"
fi

pytest -n 0 -m "$which" tests/test_cuda.py < /dev/null
for a in $archs; do
    pipa_bench --device "$DEVICE" --arch "$a" --size $size --bs 2 --turns $turns --parts encoder,head,pixel,patch,step,optimizer,ema --out "$rows" < /dev/null
done
run=$(mktemp -d)/run
python .ci/peak.py --method pipa $recipe --epochs 1 --steps $steps --workers 4 --unlabelled 0 --out "$run" < /dev/null
echo "Everything that needs a card works."
