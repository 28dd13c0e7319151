package e2btest

import (
	"encoding/base64"
	"net/http"
	"os"
	"path"
	"strconv"
	"strings"
)

// systemPath is the PATH of every process.
const systemPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// envd is the agent process in the sandbox, whom the caller may speak to.
func (v *vm) envd(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/files":
		v.files(w, r)
	case "/metrics":
		answer(w, http.StatusOK, map[string]any{"cpu_count": 2, "mem_total": 512 << 20})
	case "/envs":
		answer(w, http.StatusOK, v.spec.Env)
	case "/process.Process/Start":
		v.start(w, r)
	case "/process.Process/Connect":
		v.connect(w, r)
	case "/process.Process/List":
		unary(w, r, v.list)
	case "/process.Process/Update":
		unary(w, r, v.update)
	case "/process.Process/SendInput":
		unary(w, r, v.sendInput)
	case "/process.Process/StreamInput":
		v.streamInput(w, r)
	case "/process.Process/SendSignal":
		unary(w, r, v.sendSignal)
	case "/process.Process/CloseStdin":
		unary(w, r, v.closeStdin)
	default:
		v.filesystem(w, r)
	}
}

// An account is a user of the sandbox.
type account struct {
	name, home string
	uid, gid   uint32
}

// account reads who a request is made for. It runs on the thread of the box.
func readAccount(name string) (account, bool) {
	b, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return account{}, false
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) < 7 || f[0] != name {
			continue
		}
		uid, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			return account{}, false
		}
		gid, err := strconv.ParseUint(f[3], 10, 32)
		return account{name: name, home: f[5], uid: uint32(uid), gid: uint32(gid)}, err == nil
	}
	return account{}, false
}

// userOf is the user that a request names; "user" when it names none.
func userOf(r *http.Request) string {
	basic, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Basic ")
	if ok {
		if b, err := base64.StdEncoding.DecodeString(basic); err == nil {
			if name, _, _ := strings.Cut(string(b), ":"); name != "" {
				return name
			}
		}
	}
	return "user"
}

// resolve makes a path of the sandbox absolute, as envd does.
func (a account) resolve(name string) string {
	switch {
	case name == "" || name == "~":
		return a.home
	case strings.HasPrefix(name, "~/"):
		return path.Join(a.home, name[2:])
	case !path.IsAbs(name):
		return path.Join(a.home, name)
	}
	return path.Clean(name)
}

// as runs f on the thread of the box for the user that a request names.
func (v *vm) as(user string, f func(a account) error) error {
	if err := v.enter(); err != nil {
		return rpcErrorf("unavailable", "%v", err)
	}
	defer v.leave()
	b, err := v.machine()
	if err != nil {
		return err
	}
	return b.do(func() error {
		a, ok := readAccount(user)
		if !ok {
			return rpcErrorf("unauthenticated", "invalid username: '%s'", user)
		}
		return f(a)
	})
}
