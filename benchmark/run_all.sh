#!/usr/bin/env bash
# From nothing to the scoreboard: benchmark/run_all.sh --quick; options are those of benchmark/runner.py (--help).
set -euo pipefail
cd "$(dirname "$0")/.."
if ! python3 -c "import envs, torch, skfolio" 2>/dev/null; then
    [ -d .venv ] || python3 -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
    pip install -q -r requirements.txt
fi
exec python3 benchmark/runner.py "$@"
