#!/usr/bin/env bash
# Opens the chat in the browser on the newest run, or on the embedded model where there is none:
#
#   bash scripts/demo.sh [RUN or MODEL] [--KEY VALUE ...]     see fura-vlm chat --help
set -euo pipefail
extras=demo
case " $* " in *" --server"*) extras="demo server" ;; esac
source "$(dirname "$0")/env.sh" $extras
cd "$ROOT"
case "${1:-}" in
    "" | --*) ;;
    *) set -- --model "$@" ;;
esac
exec fura-vlm chat --web "$@"
