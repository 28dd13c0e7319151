package e2btest

import (
	"errors"
	"io/fs"
	"mime"
	"net/http"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// entry is what is said of a file.
type entry struct {
	Name          string `json:"name"`
	Type          string `json:"type"`
	Path          string `json:"path"`
	Size          string `json:"size,omitempty"` // an int64, as JSON has it
	Mode          uint32 `json:"mode,omitempty"`
	Permissions   string `json:"permissions"`
	Owner         string `json:"owner"`
	Group         string `json:"group"`
	ModifiedTime  string `json:"modifiedTime"`
	SymlinkTarget string `json:"symlinkTarget,omitempty"`
}

type entryAnswer struct {
	Entry *entry `json:"entry"`
}

// filesystem answers the calls about files.
func (v *vm) filesystem(w http.ResponseWriter, r *http.Request) {
	who := userOf(r)
	type pathRequest struct {
		Path string `json:"path"`
	}
	onPath := func(f func(a account, name string) (any, error)) {
		unary(w, r, func(in pathRequest) (out any, err error) {
			err = v.as(who, func(a account) (err error) {
				out, err = f(a, a.resolve(in.Path))
				return err
			})
			return out, err
		})
	}
	switch r.URL.Path {
	case "/filesystem.Filesystem/Stat":
		onPath(statFile)
	case "/filesystem.Filesystem/MakeDir":
		onPath(makeDir)
	case "/filesystem.Filesystem/Remove":
		onPath(func(_ account, name string) (any, error) { return nil, os.RemoveAll(name) })
	case "/filesystem.Filesystem/Move":
		unary(w, r, func(in struct {
			Source      string `json:"source"`
			Destination string `json:"destination"`
		}) (out any, err error) {
			err = v.as(who, func(a account) (err error) {
				out, err = move(a, a.resolve(in.Source), a.resolve(in.Destination))
				return err
			})
			return out, err
		})
	case "/filesystem.Filesystem/ListDir":
		unary(w, r, func(in struct {
			Path  string `json:"path"`
			Depth int    `json:"depth"`
		}) (out any, err error) {
			err = v.as(who, func(a account) (err error) {
				out, err = listDir(a.resolve(in.Path), max(in.Depth, 1))
				return err
			})
			return out, err
		})
	case "/filesystem.Filesystem/WatchDir":
		v.watchDir(w, r, who)
	case "/filesystem.Filesystem/CreateWatcher":
		unary(w, r, func(in watchRequest) (any, error) { return v.createWatcher(who, in) })
	case "/filesystem.Filesystem/GetWatcherEvents":
		unary(w, r, v.watcherEvents)
	case "/filesystem.Filesystem/RemoveWatcher":
		unary(w, r, v.removeWatcher)
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

// rpcFile makes an error of the protocol of one about a file.
func rpcFile(err error) error {
	switch {
	case err == nil:
		return nil
	case missing(err):
		return rpcErrorf("not_found", "file not found: %v", err)
	case errors.Is(err, fs.ErrExist):
		return rpcErrorf("already_exists", "%v", err)
	case errors.Is(err, fs.ErrPermission):
		return rpcErrorf("permission_denied", "%v", err)
	}
	var he *httpError
	if errors.As(err, &he) {
		return rpcErrorf("invalid_argument", "%s", he.message)
	}
	return rpcErrorf("internal", "%v", err)
}

func statFile(_ account, name string) (any, error) {
	e, err := entryOf(name)
	return entryAnswer{e}, rpcFile(err)
}

func makeDir(a account, name string) (any, error) {
	if st, err := os.Stat(name); err == nil {
		if !st.IsDir() {
			return nil, rpcErrorf("invalid_argument", "path already exists but it is not a directory: %s", name)
		}
		return nil, rpcErrorf("already_exists", "directory already exists: %s", name)
	}
	if err := a.mkdirAll(name); err != nil {
		return nil, rpcFile(err)
	}
	return statFile(a, name)
}

func move(a account, from, to string) (any, error) {
	if _, err := os.Lstat(from); err != nil {
		return nil, rpcErrorf("not_found", "source file not found: %v", err)
	}
	if err := errors.Join(a.mkdirAll(path.Dir(to)), os.Rename(from, to)); err != nil {
		return nil, rpcFile(err)
	}
	return statFile(a, to)
}

func listDir(dir string, depth int) (any, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return nil, rpcFile(err)
	}
	if !st.IsDir() {
		return nil, rpcErrorf("invalid_argument", "path is not a directory: %s", dir)
	}
	var out struct {
		Entries []*entry `json:"entries,omitempty"`
	}
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == dir {
			return err
		}
		e, err := entryOf(name)
		if missing(err) {
			return nil // it went away meanwhile
		}
		if err != nil {
			return err
		}
		out.Entries = append(out.Entries, e)
		rel, _ := filepath.Rel(dir, name)
		if d.IsDir() && strings.Count(rel, "/")+1 >= depth {
			return fs.SkipDir
		}
		return nil
	})
	return out, rpcFile(err)
}

// entryOf describes a file. Kind and mode of a link are those of what it leads
// to, the rest is its own.
func entryOf(name string) (*entry, error) {
	st, err := os.Lstat(name)
	if err != nil {
		return nil, err
	}
	e := &entry{
		Name: path.Base(name), Path: name, Type: "FILE_TYPE_UNSPECIFIED", Size: strconv.FormatInt(st.Size(), 10),
		Permissions: st.Mode().String(), ModifiedTime: st.ModTime().UTC().Format(time.RFC3339Nano),
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		e.Owner, e.Group = ownerName(sys.Uid), groupName(sys.Gid)
	}
	if st.Mode()&fs.ModeSymlink != 0 {
		e.SymlinkTarget = name
		to, err := filepath.EvalSymlinks(name)
		if err != nil {
			return e, nil // it leads nowhere
		}
		e.SymlinkTarget = to
		if st, err = os.Stat(to); err != nil {
			return e, nil
		}
	}
	e.Mode = uint32(st.Mode().Perm())
	switch {
	case st.IsDir():
		e.Type = "FILE_TYPE_DIRECTORY"
	case st.Mode().IsRegular():
		e.Type = "FILE_TYPE_FILE"
	}
	return e, nil
}

func ownerName(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return id
}

func groupName(gid uint32) string {
	id := strconv.FormatUint(uint64(gid), 10)
	if g, err := user.LookupGroupId(id); err == nil {
		return g.Name
	}
	return id
}

// fileName is the name of an uploaded file with its folders.
func fileName(disposition string) string {
	_, params, err := mime.ParseMediaType(disposition)
	if err != nil {
		return ""
	}
	return params["filename"]
}
