package host

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/repo"
)

// The state folder:
//
//	id               names this installation: labels of sandboxes, task queue of the host
//	temporal.db      the embedded server's state     gateway/    ledger of the gateway
//	engine.*         lock, endpoint, socket, log     git/        mirrors and the runs' own repositories
//	sandboxes/       local sandboxes and bases       artifacts/  prompts, transcripts, bundles
//	tmp/             bundles on their way            secrets     credentials the engine was lent, 0600
//	doors/           a socket for each sandbox

// Artifacts opens the artifact store at place, a folder or a URL as
// [artifact.Open] takes it; empty: the one in the state folder.
func Artifacts(ctx context.Context, home, place string, options ...artifact.Option) (*artifact.Store, error) {
	return artifact.Open(ctx, cmp.Or(place, filepath.Join(home, "artifacts")), options...)
}

// LedgerDir is the gateway's folder in the state folder.
func LedgerDir(home string) string { return filepath.Join(home, "gateway") }

// Repo returns the git store of the state folder.
func Repo(home string, credentials func(context.Context) (repo.Credential, error), log *slog.Logger) *repo.Store {
	return repo.New(repo.Options{Dir: filepath.Join(home, "git"), Credentials: credentials, Logger: log})
}

// ID returns the name of the installation whose state folder is home, and
// gives it one at the first call.
func ID(home string) (string, error) {
	path := filepath.Join(home, "id")
	for range 2 {
		b, err := os.ReadFile(path)
		if err == nil && len(b) > 0 {
			return strings.TrimSpace(string(b)), nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fault.New("state folder", fault.Denied, "%w", err)
		}
		random := make([]byte, 4)
		_, _ = rand.Read(random) // never fails, says its documentation
		temp := fmt.Sprintf("%s.%d", path, os.Getpid())
		err = os.WriteFile(temp, []byte(hex.EncodeToString(random)+"\n"), 0o600)
		if err == nil {
			err = os.Link(temp, path) // of two at once, one wins
			_ = os.Remove(temp)
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return "", fault.New("state folder", fault.Denied, "%w", err).
				Hinted("Set SANDBOX_TEMPORAL_HOME to a folder that can be written.")
		}
	}
	return "", fault.New("state folder", fault.Internal, "%s is empty", path)
}

// doorsPath returns the folder of the sockets that sandboxes reach the gateway
// by. A unix socket's path has at most 107 bytes (unix(7)); a deep state folder
// gets a short one elsewhere.
func doorsPath(home string) (string, error) {
	fits := func(dir string) bool { return len(dir)+len("/")+doorName+len(".sock") <= 107 }
	path := filepath.Join(home, "doors")
	if fits(path) {
		return path, os.MkdirAll(path, 0o700)
	}
	sum := sha256.Sum256([]byte(home))
	name := fmt.Sprintf("sandbox-temporal-%d-%x", os.Getuid(), sum[:6])
	dir := filepath.Join(os.TempDir(), name)
	if !fits(dir) {
		dir = filepath.Join("/tmp", name)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fault.New("gateway", fault.Denied, "%w", err)
	}
	info, err := os.Lstat(dir)
	if err != nil || !info.IsDir() || info.Mode().Perm() != 0o700 || !ours(info) {
		return "", fault.New("gateway", fault.Denied, "%s is not a private folder of ours", dir).
			Hinted("Remove it, or set SANDBOX_TEMPORAL_HOME to a shorter path.")
	}
	return dir, nil
}

// freshDir makes dir, empty.
func freshDir(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fault.New("state folder", fault.Denied, "%w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fault.New("state folder", fault.Denied, "%w", err)
	}
	return nil
}
