package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A vault holds the credentials of an engine: those of its own environment,
// and those that commands lend it. They are kept in a file of mode 0600 for
// the engine's next start.
type vault struct {
	path string
	mu   sync.Mutex
	held config.Secrets
}

func openVault(home string, getenv func(string) string) (*vault, error) {
	v := &vault{path: filepath.Join(home, "secrets")}
	mine, err := config.ReadSecrets(getenv)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(v.path)
	if errors.Is(err, fs.ErrNotExist) {
		v.held = mine
		return v, nil
	}
	if err != nil {
		return nil, fault.New("credentials", fault.Denied, "%w", err)
	}
	kept, err := config.ParseSecrets(b)
	if err != nil {
		return nil, fault.Wrap(v.path, err)
	}
	v.held = mine.Or(kept)
	return v, nil
}

// secrets returns what is held now.
func (v *vault) secrets() config.Secrets {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.held
}

// add takes what a command lends and keeps what it did not.
func (v *vault) add(b []byte) error {
	lent, err := config.ParseSecrets(b)
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.held = lent.Or(v.held)
	b, err = v.held.Reveal()
	if err != nil {
		return fault.New("credentials", fault.Internal, "%w", err)
	}
	temp := fmt.Sprintf("%s.%d", v.path, os.Getpid())
	if err := os.WriteFile(temp, b, 0o600); err != nil {
		return fault.New("credentials", fault.Denied, "%w", err)
	}
	if err := os.Rename(temp, v.path); err != nil {
		return fault.New("credentials", fault.Denied, "%w", err)
	}
	return nil
}
