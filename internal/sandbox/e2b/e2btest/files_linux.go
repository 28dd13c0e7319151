package e2btest

import (
	"cmp"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"strings"
	"syscall"
)

// files sends and takes whole files over plain HTTP.
func (v *vm) files(w http.ResponseWriter, r *http.Request) {
	user := cmp.Or(r.URL.Query().Get("username"), userOf(r))
	switch r.Method {
	case http.MethodGet:
		v.download(w, r, user)
	case http.MethodPost:
		v.upload(w, r, user)
	default:
		w.Header().Set("Allow", "GET, POST")
		w.WriteHeader(http.StatusMethodNotAllowed)
	}
}

// An httpError is a status and what is said with it.
type httpError struct {
	status  int
	message string
}

func (e *httpError) Error() string { return e.message }

func httpErrorf(status int, format string, args ...any) *httpError {
	return &httpError{status, fmt.Sprintf(format, args...)}
}

// failFile answers with an error of the files' endpoint.
func failFile(w http.ResponseWriter, err error) {
	var he *httpError
	var re *rpcError
	switch {
	case errors.As(err, &he):
		fail(w, he.status, he.message)
	case errors.As(err, &re):
		fail(w, rpcStatus[re.Code], re.Message)
	case errors.Is(err, syscall.ENOSPC):
		fail(w, http.StatusInsufficientStorage, "not enough disk space available")
	default:
		fail(w, http.StatusInternalServerError, err.Error())
	}
}

func (v *vm) download(w http.ResponseWriter, r *http.Request, user string) {
	var f *os.File
	var st os.FileInfo
	err := v.as(user, func(a account) (err error) {
		name := a.resolve(r.URL.Query().Get("path"))
		// Not to wait for the writer of a pipe.
		f, err = os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		switch {
		case missing(err):
			return httpErrorf(http.StatusNotFound, "path '%s' does not exist", name)
		case err != nil:
			return err
		}
		if st, err = f.Stat(); err == nil && !st.Mode().IsRegular() {
			err = httpErrorf(http.StatusBadRequest, "path '%s' is not a regular file", name)
			if st.IsDir() {
				err = httpErrorf(http.StatusBadRequest, "path '%s' is a directory", name)
			}
		}
		return err
	})
	if f != nil {
		defer f.Close()
	}
	if err != nil {
		failFile(w, err)
		return
	}
	w.Header().Set("Content-Disposition", fmt.Sprintf("inline; filename=%q", path.Base(st.Name())))
	w.Header().Set("Vary", "Accept-Encoding")
	if r.Header.Get("Range") == "" && strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Content-Type", "application/octet-stream")
		z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed) // a level that there is
		if _, err := io.Copy(z, f); err == nil {
			_ = z.Close() // nobody reads it
		}
		return
	}
	http.ServeContent(w, r, st.Name(), st.ModTime(), f)
}

// written is what is said of a file that was uploaded.
type written struct {
	Name string `json:"name"`
	Type string `json:"type"`
	Path string `json:"path"`
}

func (v *vm) upload(w http.ResponseWriter, r *http.Request, user string) {
	body := io.Reader(r.Body)
	if r.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			fail(w, http.StatusBadRequest, err.Error())
			return
		}
		body = z
	}
	name := r.URL.Query().Get("path")
	kind, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	var out []written
	var err error
	switch kind {
	case "application/octet-stream":
		var one written
		one, err = v.store(user, name, body)
		out = append(out, one)
	case "multipart/form-data":
		out, err = v.uploadParts(r, user, name)
	default:
		err = httpErrorf(http.StatusBadRequest, "content type %q is not supported", kind)
	}
	if err != nil {
		failFile(w, err)
		return
	}
	answer(w, http.StatusOK, out)
}

// uploadParts stores each part of a form: under name, or under the part's
// own name when that is empty.
func (v *vm) uploadParts(r *http.Request, user, name string) ([]written, error) {
	form, err := r.MultipartReader()
	if err != nil {
		return nil, httpErrorf(http.StatusBadRequest, "error parsing multipart form: %v", err)
	}
	out := []written{}
	for {
		part, err := form.NextPart()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, httpErrorf(http.StatusBadRequest, "error reading form: %v", err)
		}
		if part.FormName() != "file" {
			continue
		}
		// Of a file name, the standard library drops the folders.
		to := cmp.Or(name, fileName(part.Header.Get("Content-Disposition")))
		if to == "" {
			return nil, httpErrorf(http.StatusBadRequest, "a file has no name")
		}
		one, err := v.store(user, to, part)
		if err != nil {
			return nil, err
		}
		out = append(out, one)
	}
}

// store writes a file in place, as the bytes come: who breaks off leaves half
// of it.
func (v *vm) store(user, to string, body io.Reader) (written, error) {
	var f *os.File
	var name string
	err := v.as(user, func(a account) (err error) {
		name = a.resolve(to)
		if err := a.mkdirAll(path.Dir(name)); err != nil {
			return err
		}
		if st, err := os.Stat(name); err == nil && st.IsDir() {
			return httpErrorf(http.StatusBadRequest, "path is a directory: %s", name)
		}
		if f, err = os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NONBLOCK, 0o666); err != nil {
			return fmt.Errorf("error opening file: %w", err)
		}
		return f.Chown(int(a.uid), int(a.gid))
	})
	if err != nil {
		if f != nil {
			_ = f.Close()
		}
		return written{}, err
	}
	// In large steps, and not by the file's own way, which has small ones.
	if _, err := io.CopyBuffer(struct{ io.Writer }{f}, body, make([]byte, 256<<10)); err != nil {
		_ = f.Close()
		return written{}, fmt.Errorf("error writing file: %w", err)
	}
	if err := f.Close(); err != nil {
		return written{}, fmt.Errorf("error writing file: %w", err)
	}
	return written{path.Base(name), "file", name}, nil
}

// mkdirAll makes the folders that are missing, for the user.
func (a account) mkdirAll(dir string) error {
	if st, err := os.Stat(dir); err == nil {
		if !st.IsDir() {
			return httpErrorf(http.StatusBadRequest, "path is a file: %s", dir)
		}
		return nil
	}
	if dir != "/" {
		if err := a.mkdirAll(path.Dir(dir)); err != nil {
			return err
		}
	}
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err == nil {
		err = os.Chown(dir, int(a.uid), int(a.gid))
	}
	return err
}

// missing reports whether there is no such file, whatever stands in its way.
func missing(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ENXIO)
}
