#!/usr/bin/env bash
# need.sh COMMAND... makes sure that each COMMAND is there. What is missing is
# installed on a Debian machine when we are root; anyone else is told what to
# install. Go itself is never installed: only its version is looked at. A COMMAND
# with a "?" behind it is one that tests skip without, so nobody is kept from
# anything when it cannot be installed.
set -euo pipefail
cd "$(dirname "$0")/.."

# packages says which Debian packages bring a command.
packages() {
  case $1 in
    cc) echo gcc libc6-dev ;; # the race detector links with cgo
    npm) echo npm nodejs ;;
    postgres) echo postgresql ;;
    *) echo "$1" ;;
  esac
}

# have says whether a command is there and works.
have() {
  # Debian keeps the programs of PostgreSQL's server away from the PATH.
  [[ $1 != postgres ]] || { compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null && return 0; }
  command -v "$1" >/dev/null || return 1
  # A compiler without the C library's headers is of no use.
  [[ $1 != cc ]] || echo '#include <stdlib.h>' | cc -E -x c - >/dev/null 2>&1
}

missing=() wished=()
for want in "$@"; do
  if [[ $want == *\? ]]; then
    # shellcheck disable=SC2207 # package names have no spaces
    have "${want%\?}" || wished+=($(packages "${want%\?}"))
  elif [[ $want == go ]]; then
    if ! have go; then
      echo "need: there is no go command. Install Go $(awk '$1 == "go" {print $2}' go.mod) or newer, and have it on the PATH." >&2
      exit 1
    fi
  elif ! have "$want"; then
    # shellcheck disable=SC2207 # package names have no spaces
    missing+=($(packages "$want"))
  fi
done
((${#missing[@]} + ${#wished[@]})) || exit 0

if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
  if ((${#wished[@]})); then
    echo "need: this machine lacks: ${wished[*]} (names of Debian packages). Some tests will be skipped." >&2
  fi
  ((${#missing[@]})) || exit 0
  echo "need: this machine lacks: ${missing[*]} (names of Debian packages)." >&2
  echo "Install them, or run this again as root on Debian or Ubuntu: apt-get install ${missing[*]}" >&2
  exit 1
fi
missing+=("${wished[@]}")
echo "need: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq </dev/null >&2
if [[ " ${missing[*]} " == *' postgresql '* && ! -d /etc/postgresql ]]; then
  # The tests start servers of their own: do not let Debian's package start one.
  apt-get install -y -qq --no-install-recommends postgresql-common </dev/null >&2
  sed -ri 's/^#?create_main_cluster\>.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
fi
if [[ " ${missing[*]} " == *' prometheus '* && ! -e /etc/systemd/system/prometheus.service ]]; then
  # Likewise; Debian's would also take port 9090 from our own engines. "systemctl
  # unmask prometheus" lets it start.
  mkdir -p /etc/systemd/system
  ln -s /dev/null /etc/systemd/system/prometheus.service
fi
apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >&2
