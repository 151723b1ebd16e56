#!/usr/bin/env bash
# From nothing to the scoreboard: benchmark/run_all.sh --quick, from any folder. Options are those of runner.py (--help).
# Uses the active Python where it has all that is needed; otherwise makes .venv beside README.md, once.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=python3
needed="import envs.ledger, gymnasium, h5py, skfolio, tensorboard, torch, tqdm, tyro"
if ! "$python" -c "$needed" 2>/dev/null; then
    python="$root/.venv/bin/python"
    if ! "$python" -c "$needed" 2>/dev/null; then
        echo "installing requirements.txt into $root/.venv" >&2
        python3 -m venv "$root/.venv"
        (cd "$root" && "$python" -m pip install -q -r requirements.txt)
    fi
fi
exec "$python" "$root/benchmark/runner.py" "$@"
