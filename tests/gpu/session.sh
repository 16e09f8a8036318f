#!/usr/bin/env bash
# A GPU's nine minutes: every script once on it, gradients, speed, and nanoGPT's Shakespeare setting.
#   CORPUS=tinyshakespeare.txt bash tests/gpu/session.sh
# OUT=folder      of session.json and session.log (out/gpu_session)
# BUDGET=seconds  after which it has ended (520)
# PARTS=names     of smoke,gradients,speed,train; what matters most comes first in each
# TINY=1          the same steps at tiny sizes on the CPU, to try the script itself (BUDGET 600)
# PYTHON=path     one with torch and numpy (the first that is found); nothing is downloaded
set -u
export BEGUN=$(date +%s)
export CORPUS=${CORPUS:-data/shakespeare.txt}
export OUT=${OUT:-out/gpu_session} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# many processes side by side
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=3
[ -f "$CORPUS" ] || { echo "error: no text at CORPUS=$CORPUS: name a copy of tiny Shakespeare"; exit 2; }
CORPUS=$(realpath "$CORPUS")
mkdir -p "$OUT" && OUT=$(realpath "$OUT") || exit 2
[ -w "$OUT" ] || { echo "error: cannot write to OUT=$OUT: name another folder"; exit 2; }
[[ ${BUDGET:-0} =~ ^[0-9]+$ ]] || { echo "error: BUDGET=$BUDGET must be whole seconds"; exit 2; }
found='from importlib.util import find_spec; assert find_spec("torch") and find_spec("numpy")'
for python in "${PYTHON:-}" python3 python; do
    [ -n "$python" ] && "$python" -c "$found" 2> /dev/null && break
    python=
done
[ -n "$python" ] || { echo 'error: no python with torch and numpy: name one by PYTHON=path'; exit 2; }
cd "$(dirname "$0")/../.." || exit 2
export PYTHONPATH=$PWD
"$python" tests/gpu/session.py 2>&1 | tee "$OUT/session.log"
exit "${PIPESTATUS[0]}"
