#!/usr/bin/env bash
# All that needs a GPU, in under eight minutes: tests on it, then rates as shares of what was measured
# to be possible. bench/gpu.sh --small is the same in miniature on the CPU.
#
# It runs where nothing can be downloaded: wheels in .whl/ are installed beside Python's own packages,
# and the native core is built if it is missing, with the CMake and nanobind that are there. Beside
# what PyTorch and transformers bring, wheels of these are needed: annotated-types fastapi gguf httptools
# llguidance prompt-toolkit pydantic pydantic-core starlette typing-inspection uvicorn wcwidth.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  [ ! -x .venv/bin/python ] || python=.venv/bin/python
fi
export OUT=${OUT:-$PWD/build/gpu} PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD/src:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"

site=${TMPDIR:-/tmp}/squall-site-$(id -u)
if compgen -G ".whl/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" .whl/*.whl
  export PYTHONPATH=$PYTHONPATH:$site
fi
if ! "$python" -c "import squall._native" 2>/dev/null; then
  echo "building the native core ..."
  "$python" -m pip install -q --no-index --no-deps --no-build-isolation --target "$site/native" . \
    || echo "the native core could not be built" >&2
  cp "$site"/native/squall/_native*.so src/squall/ || true
fi
export SQUALL_GPU_S=${SQUALL_GPU_S:-$((460 - SECONDS))}
exec "$python" bench/gpu_steps.py "$@"
