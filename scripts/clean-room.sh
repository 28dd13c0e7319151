#!/usr/bin/env bash
# clean-room.sh [--keep-modules] [COMMAND...] tries the project as a stranger
# would: a fresh clone of the committed state, an empty HOME, empty caches, and
# then the README's two commands (or the COMMANDs given). It says how long each
# took and what it left running behind: processes, mounts, cgroups, files in
# /tmp. It fails when a command fails or anything is left.
#
# --keep-modules takes the module cache of whoever runs it, so that nothing is
# downloaded a second time; everything is still compiled anew.
set -euo pipefail
cd "$(dirname "$0")/.."

modules=
if [[ ${1-} == --keep-modules ]]; then
  modules=$(go env GOMODCACHE)
  shift
fi
commands=("$@")
((${#commands[@]})) || commands=('make demo' 'make test')

[[ -z $(git status --porcelain) ]] || echo "clean-room: what is not committed is not tried" >&2

room=$(mktemp -d "${TMPDIR:-/tmp}/clean-room.XXXXXX")
mkdir "$room/home"
git clone -q --no-hardlinks . "$room/clone"

# The environment: what a fresh login has, and what this machine needs to reach
# package registries.
vars=("HOME=$room/home" "PATH=$PATH" "LANG=${LANG:-C.UTF-8}" "TERM=${TERM:-dumb}"
  "GOCACHE=$room/gocache" "GOMODCACHE=${modules:-$room/gomodcache}" "GOPATH=$room/gopath"
  "GOPROXY=$(go env GOPROXY)" "GOSUMDB=$(go env GOSUMDB)")
while IFS= read -r name; do
  vars+=("$name=${!name}")
done < <(compgen -e | grep -iE '^(https?_proxy|no_proxy|npm_config_registry|ssl_cert_(file|dir)|node_extra_ca_certs)$' || true)

mounts() { awk '{print $5}' /proc/self/mountinfo | sort; }
cgroups() { find /sys/fs/cgroup -type d 2>/dev/null | sort; }
# The demo's repository is for its user to look at and remove, as it says.
temporary() { find "${TMPDIR:-/tmp}" -mindepth 1 -maxdepth 1 ! -path "$room" ! -name 'go-build*' ! -name 'sandbox-temporal-demo-*' | sort; }

# processes lists those that run a program of the room, stand in it, or were
# started with a path of it.
processes() {
  local pid at
  for pid in /proc/[0-9]*; do
    {
      for at in exe cwd root; do readlink "$pid/$at"; done
      tr '\0' '\n' <"$pid/cmdline"
      tr '\0' '\n' <"$pid/environ" || true
    } 2>/dev/null | grep -F "$room/" >/dev/null || continue
    printf '%s %s\n' "${pid#/proc/}" "$(tr '\0' ' ' 2>/dev/null <"$pid/cmdline" | cut -c1-160)"
  done
}

before=$(mktemp -d "$room/before.XXXXXX")
mounts >"$before/mounts"
cgroups >"$before/cgroups"
temporary >"$before/temporary"

bad=0
for command in "${commands[@]}"; do
  echo "=== $command"
  start=$SECONDS
  if (cd "$room/clone" && env -i "${vars[@]}" bash -c "$command" </dev/null); then
    echo "=== $command: done in $((SECONDS - start)) s"
  else
    echo "=== $command: FAILED after $((SECONDS - start)) s"
    bad=1
  fi
done

# left shows the lines of $2, if any, under the heading $1.
left() {
  [[ -n $2 ]] || return 0
  printf 'left behind, %s:\n%s\n' "$1" "$2"
  bad=1
}
left 'processes' "$(processes)"
left 'mounts' "$(comm -13 "$before/mounts" <(mounts))"
left 'cgroups' "$(comm -13 "$before/cgroups" <(cgroups))"
left 'files in the folder for temporary ones' "$(comm -13 "$before/temporary" <(temporary))"
left 'changes in the clone' "$(git -C "$room/clone" status --porcelain)"

if ((bad)); then
  echo "clean-room: not clean; kept $room" >&2
  exit 1
fi
chmod -R u+w "$room" # Go's module cache is read-only
rm -rf "$room"
echo "clean-room: nothing left behind"
