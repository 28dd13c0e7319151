package sandbox

import "fmt"

// ManyFiles is how many files a repository has at least where it pays that git
// asks what has changed: that takes it as long as to look at some thousand.
const ManyFiles = 10_000

// SettleIndex returns a shell script that runs in [Workspace] before a base is
// frozen, while nobody changes anything there. It leaves an index that git need
// not look behind in a fork. Files that were written in the same second as the
// index are read again by every status, and the index is written again then, so
// it waits for the next second. What git finds in folders is kept in the index
// too, where git sees by their times that nothing was added
// (git-update-index(1), "Untracked cache"): the first status reads no folder.
//
// Where somebody answers at [ChangesPort] and the repository has that many
// files, git asks there which of them it need look at, and the index says of
// all that they are as they were. Git before 2.38 is not told to: it relied on
// such answers for submodules too.
func SettleIndex(many int) string {
	return fmt.Sprintf(settleScript, Workspace, ChangesPort, many, ChangesToken)
}

// The first answers that git gets are made up here: nothing has changed since.
const settleScript = `git update-index -q --refresh
now=$(date +%%s); while [ "$(date +%%s)" = "$now" ]; do sleep 0.05; done
git update-index -q --untracked-cache
token=
ask='2> /dev/null bash -c '\''[ . -ef %[1]s ] && exec 3<> /dev/tcp/127.0.0.1/%[2]d && printf "%%s\n" "$2" >&3 && exec cat <&3'\'' git'
case $(git version) in
'git version '[01].* | 'git version '2.[0-9].* | 'git version '2.[12][0-9].* | 'git version '2.3[0-7].*) ;;
*)
	if [ "$(git ls-files | head -n %[3]d | wc -l)" -ge %[3]d ] &&
		[ "$(timeout 5 sh -c "$ask \"\$@\"" git 2 none | tr '\0' ' ')" = '` + Unsure + ` / ' ]; then
		token=$(mktemp -u XXXXXXXXXXXXXXXX)
		: > .git/%[4]s
		echo "$token $(stat -c %%i .git/%[4]s)" > .git/%[4]s
		git config core.fsmonitorHookVersion 2
		git config core.fsmonitor "printf '$token\\0' #"
		git update-index -q --fsmonitor
		git update-index -q --refresh
	fi
	;;
esac
git status --porcelain > /dev/null
git update-index -q --force-write-index
[ -z "$token" ] || git config core.fsmonitor "$ask"
true`
