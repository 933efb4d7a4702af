#!/usr/bin/env bash
# Run one program of launch/ on GKE as a JobSet (https://jobset.sigs.k8s.io, 0.6 or newer in the cluster).
#
#   launch/gke.sh --name RUN --image IMAGE --tpu tpu-v5p-slice:4x4x4 -- train configs/RECIPE.py --output gs://B/RUN
#   launch/gke.sh --name RUN --image IMAGE --gpu nvidia-h100-80gb:8 --hosts 4 -- train ...
#
#   --tpu TYPE:TOPOLOGY   a TPU slice: its gke-tpu-accelerator and gke-tpu-topology
#   --chips N             chips of each of its hosts (default 4)
#   --gpu TYPE:COUNT      GPU nodes: their gke-accelerator, and GPUs on each; --hosts N says how many nodes
#   --dry-run             print the manifest, apply nothing
#
# IMAGE holds the repository as its working directory and mmrlhf_jax with the extras tpu or cuda, and gcs. When a host
# ends with 75 (interrupted) or is evicted, the set starts again and resumes; after other failures three times.
set -euo pipefail
fail() { printf 'gke.sh: %s\n' "$1" >&2 && exit 2; }

name='' image='' tpu='' gpu='' hosts='' chips=4 dry_run=false
while (($#)); do
  case $1 in
    --name | --image | --tpu | --gpu | --hosts | --chips)
      (($# > 1)) || fail "$1 needs a value"
      printf -v "${1#--}" %s "$2" && shift 2 ;;
    --dry-run) dry_run=true && shift ;;
    --help | -h) sed -n '2,14s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --) shift && break ;;
    *) fail "unknown flag $1; put the program after --" ;;
  esac
done
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name: lower-case letters, digits and -, at most 40"
[[ $image =~ ^[-a-zA-Z0-9./:_@]+$ && $chips =~ ^[1-9]$ && $# -gt 0 ]] || fail "--image and -- PROGRAM are needed"

environment='[]' # GKE itself tells the hosts of a TPU slice of each other
if [[ $tpu =~ ^[a-z0-9-]+:([0-9]+)x([0-9]+)(x([0-9]+))?$ && ! $gpu$hosts ]]; then
  hosts=$(((BASH_REMATCH[1] * BASH_REMATCH[2] * ${BASH_REMATCH[4]:-1} + chips - 1) / chips))
  nodes="{cloud.google.com/gke-tpu-accelerator: ${tpu%:*}, cloud.google.com/gke-tpu-topology: ${tpu#*:}}"
  limits="{google.com/tpu: $chips}"
elif [[ $gpu =~ ^[a-z0-9-]+:[1-9][0-9]*$ && $hosts =~ ^[1-9][0-9]*$ && ! $tpu ]]; then
  nodes="{cloud.google.com/gke-accelerator: ${gpu%:*}}" limits="{nvidia.com/gpu: ${gpu#*:}}"
  index="{fieldRef: {fieldPath: \"metadata.annotations['batch.kubernetes.io/job-completion-index']\"}}"
  environment="[{name: JAX_COORDINATOR_ADDRESS, value: \"$name-host-0-0.$name:8476\"}"
  environment+=", {name: JAX_NUM_PROCESSES, value: \"$hosts\"}, {name: JAX_PROCESS_ID, valueFrom: $index}"
  environment+=", {name: LD_LIBRARY_PATH, value: /usr/local/nvidia/lib64}]" # where GKE puts the driver
else
  fail "give --tpu TYPE:TOPOLOGY, or --gpu TYPE:COUNT and --hosts N"
fi

program=$1 && shift
[[ -f $(dirname "$0")/$program.py ]] || fail "launch/ has no program '$program'"
command='' # a JSON list, hence YAML; $(X) would be a variable to Kubernetes
for word in python "launch/$program.py" "$@"; do
  [[ $word != *[[:cntrl:]]* ]] || fail "an argument has control characters"
  word=${word//\\/\\\\} && word=${word//\"/\\\"} && command+=", \"${word//\$(/\$\$(}\""
done
manifest=$(<"$(dirname "$0")/gke.yaml")
fill() { manifest=${manifest//"<$1>"/"$2"}; }
fill name "$name" && fill image "$image" && fill hosts "$hosts" && fill nodes "$nodes" && fill limits "$limits"
fill environment "$environment" && fill command "[${command#, }]" # last, what it holds is not ours
if $dry_run; then printf '%s\n' "$manifest"; else kubectl apply -f - <<<"$manifest"; fi
