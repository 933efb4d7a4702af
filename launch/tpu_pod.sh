#!/usr/bin/env bash
# Run one program of launch/ on every host of a Cloud TPU slice; the hosts find each other by themselves.
#
#   launch/tpu_pod.sh --name TPU --zone ZONE --install https://github.com/OWNER/REPO    once, and to update
#   launch/tpu_pod.sh --name TPU --zone ZONE -- train configs/RECIPE.py --output gs://BUCKET/RUN
#
#   --project P      Google Cloud project (default: gcloud's own)
#   --repo DIR       where the repository is on the hosts, below their home directory (default: mmrlhf_jax)
#   --install URL    clone or update it there, and install it with Python 3.12 into DIR/.venv (by uv)
#   --retry          while the program says 75 (interrupted), run it again, which resumes
#   --stop           tell the programs of launch/ that run there to save and end; also after a lost connection, which
#                    they outlive (start long work in tmux, on a machine that stays on)
#   --dry-run        print the commands, run nothing
#
# Exit code: that of the program on the first host where it is not 0; 75: the same command again resumes.
set -euo pipefail
fail() { printf 'tpu_pod.sh: %s\n' "$1" >&2 && exit 2; }
name='' zone='' project='' repo=mmrlhf_jax source='' retry=false stop=false dry_run=false
while (($#)); do
  case $1 in
    --name | --zone | --project | --repo | --install)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in --install) source=$2 ;; *) printf -v "${1#--}" %s "$2" ;; esac
      shift 2 ;;
    --retry) retry=true && shift ;;
    --stop) stop=true && shift ;;
    --dry-run) dry_run=true && shift ;;
    --help | -h) sed -n '2,15s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --) shift && break ;;
    *) fail "unknown flag $1; put the program after --" ;;
  esac
done
[[ $name && $zone ]] || fail "--name and --zone are needed; see --help"
if (($# == 0)) && [[ ! $source ]] && ! $stop; then fail "give -- PROGRAM ARGUMENT..., --install URL or --stop"; fi

everywhere() { # COMMAND: by the login shell of every host, at once
  local line=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" ${project:+--project="$project"})
  line+=(--worker=all --command="$1")
  if $dry_run; then printf '%q ' "${line[@]}" && echo; else "${line[@]}"; fi
}

if $stop; then everywhere "pkill -TERM -f '[l]aunch/[a-z_]*[.]py' || true"; exit; fi # [l]: not this shell itself
printf -v there %q "$repo"
if [[ $source ]]; then
  everywhere "set -e; export PATH=\$HOME/.local/bin:\$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    if [ -d $there/.git ]; then git -C $there pull --ff-only; else git clone $(printf %q "$source") $there; fi
    cd $there; [ -x .venv/bin/python ] || uv venv --python 3.12 .venv; uv pip install --python .venv -e '.[tpu,gcs]'"
fi
(($#)) || exit 0
program=$1 && shift
[[ -f $(dirname "$0")/$program.py ]] || fail "launch/ has no program '$program'"
printf -v arguments ' %q' "launch/$program.py" "$@"
status=75
while ((status == 75)); do
  status=0
  everywhere "cd $there && exec .venv/bin/python$arguments" || status=$?
  $retry || break
done
exit "$status"
