//go:build !linux

package e2btest

import (
	"errors"
	"net/http"
)

var errUnsupported = errors.New("sandboxes need Linux")

// Supported returns nil when sandboxes can be made here, and why not
// otherwise.
func Supported() error { return errUnsupported }

type box struct{}

func openBox(string, []Mount) (*box, error) { return nil, errUnsupported }

func plant(string, []Mount) error { return errUnsupported }

func copyTree(string, string) error { return errUnsupported }

func (b *box) all(string) error { return errUnsupported }

func (b *box) close() {}

type process struct{}

type watcher struct{}

func (v *vm) forget() {}

func (v *vm) envd(w http.ResponseWriter, _ *http.Request) {
	fail(w, http.StatusNotImplemented, errUnsupported.Error())
}
