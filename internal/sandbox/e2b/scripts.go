package e2b

import "github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"

// What is ours in a sandbox. The folder of processes and that of uploads are
// the agent's, as those who write there are.
const (
	stateDir     = "/var/sandbox-temporal"
	processDir   = stateDir + "/p"
	uploadDir    = stateDir + "/up"
	deadlineFile = stateDir + "/deadline"
	pausedFile   = stateDir + "/paused" // there while a user holds the sandbox
	ownerFile    = stateDir + "/sandbox"
)

// Exit codes of the scripts, which no tool has.
const (
	codeInvalid  = 91
	codeNotFound = 92
)

// endScript ends what a machine that was made of a snapshot has of its source:
// E2B keeps processes too. $1 is the machine's id.
const endScript = `[ "$(cat ` + ownerFile + ` 2>/dev/null)" = "$1" ] && exit 0
kill -s KILL -- -1 2>/dev/null
exit 0`

// prepareScript makes a machine of E2B a sandbox of ours, once. Paths mean
// what they mean everywhere, and belong to E2B's own user: templates have
// installed their programs for that one.
//
// $1 is the machine's id, $2 the deadline.
const prepareScript = `set -e
[ "$(cat ` + ownerFile + ` 2>/dev/null)" != "$1" ] || exit 0
rm -rf ` + processDir + ` ` + uploadDir + ` ` + pausedFile + `
mkdir -p ` + processDir + ` ` + uploadDir + ` ` + sandbox.Workspace + ` ` + sandbox.Home + ` ` + sandbox.ProgramDir + `
chown user ` + processDir + ` ` + uploadDir + ` ` + sandbox.Workspace + ` ` + sandbox.Home + `
chmod 755 ` + stateDir + ` ` + sandbox.Home + ` ` + sandbox.Workspace + `
chmod 700 ` + processDir + ` ` + uploadDir + `
printf %s "$2" > ` + deadlineFile + `
printf %s "$1" > ` + ownerFile + `.new
mv ` + ownerFile + `.new ` + ownerFile + "\n"

// launchScript starts a command that lives on without us, and returns when it
// runs. $1 is the folder of the process, $2 the working directory, $3 the
// file to read or "", and then comes the command.
//
// The command leads a session and a process group of its own. Nothing of it
// is started with &, as shells have such commands ignore SIGINT. Who waits for
// it is in another group and writes down how it ended. Everything is
// redirected: what holds on to our own output would keep the call from
// ending.
const launchScript = `S=$1 D=$2 I=$3
[ -d "$S" ] && exit 0
cd "$D" 2>/dev/null || exit 91
if [ -n "$I" ]; then
  [ -f "$I" ] && [ -r "$I" ] || exit 91
else
  I=/dev/null
fi
shift 3
P=$PATH
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
setsid -f /bin/sh -c "$RUN" run "$S" "$I" "$P" "$@" </dev/null >/dev/null 2>&1 || exit 1
n=0
until [ -s "$S/pid" ] || [ -e "$S/exit" ]; do
  n=$((n+1))
  [ $n -lt 2000 ] || sleep 0.01
  [ $n -lt 5000 ] || exit 1
done`

// runScript is what waits for the command. What is read by way of live says
// also that the command has not ended.
const runScript = `S=$1 I=$2 P=$3
shift 3
unset RUN
mkdir "$S" 2>/dev/null || exit 0
echo $$ > "$S/runner"
: > "$S/stdout"
: > "$S/stderr"
ln -s . "$S/live"
setsid /bin/sh -c 'S=$1 PATH=$2
shift 2
echo $$ > "$S/pid"
export PATH
unset S
exec "$@"' run "$S" "$P" "$@" <"$I" >"$S/stdout" 2>"$S/stderr"
st=$?
echo $st > "$S/exit.new" && mv "$S/exit.new" "$S/exit" && rm -f "$S/live"`

// signalScript sends the signal $2 to the group of the process in $1, unless
// it has ended and its number may be another's.
const signalScript = `[ -e "$1/exit" ] && exit 0
pid=$(cat "$1/pid" 2>/dev/null) || exit 0
case $pid in ''|*[!0-9]*|0|1) exit 0;; esac
kill -s "$2" -- "-$pid" 2>/dev/null
exit 0`

// aliveScript finds a process whose end nobody will write down, as who was to
// do it has been killed.
const aliveScript = `[ -e "$1/exit" ] && exit 0
for n in 1 2; do
  runner=$(cat "$1/runner" 2>/dev/null)
  case $runner in ''|*[!0-9]*) sleep 1; continue;; esac
  kill -0 "$runner" 2>/dev/null && exit 0
  [ -e "$1/exit" ] && exit 0
done
pid=$(cat "$1/pid" 2>/dev/null)
case $pid in ''|*[!0-9]*|0|1) ;; *) kill -s KILL -- "-$pid" 2>/dev/null;; esac
echo 137 > "$1/exit.new" && mv "$1/exit.new" "$1/exit" && rm -f "$1/live"`

// settleScript puts an uploaded file in its place, with as few programs as can
// be: each takes as long as several megabytes.
const settleScript = `[ -d "$2" ] && { rm -f "$1"; exit 91; }
d=${2%/*}
[ -d "${d:-/}" ] || mkdir -p -- "$d" 2>/dev/null || { rm -f "$1"; exit 91; }
exec mv -f -T -- "$1" "$2"`

// lookScript says what is at a path before it is opened: a pipe would wait
// for its writer.
const lookScript = `[ -f "$1" ] && exit 0
[ -e "$1" ] && exit 91
exit 92`

// tailScript reads a part of a file for services that know no ranges. $2 is
// where it begins, from 1, and $3 how much.
const tailScript = `[ -e "$1" ] || exit 92
tail -c "+$2" -- "$1" | head -c "$3"`

// holdScript and letScript stop and continue all that the agent has. The
// signal reaches every process of the user but the shell that sends it; the
// first waits until all stand still.
const (
	holdScript = `n=0
while [ $n -lt 200 ]; do
  kill -s STOP -- -1 2>/dev/null || exit 0
  moving=
  for d in /proc/[0-9]*; do
    [ -O "$d" ] && [ "$d" != "/proc/$$" ] || continue
    while read -r name state rest; do
      [ "$name" = State: ] || continue
      case $state in T|t|Z|X) ;; *) moving=1;; esac
      break
    done 2>/dev/null < "$d/status"
  done 2>/dev/null
  [ -n "$moving" ] || exit 0
  n=$((n+1))
  sleep 0.01
done
exit 1`
	letScript  = `kill -s CONT -- -1 2>/dev/null; exit 0`
	killScript = `kill -s KILL -- -1 2>/dev/null; exit 0`
)
