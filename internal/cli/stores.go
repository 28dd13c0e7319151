package cli

import (
	"context"
	"io"
	"log/slog"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/config"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
	"github.com/sandbox-temporal/sandbox-temporal/internal/host"
)

// transcripts reads what agents printed from the artifact store.
type transcripts struct{ store *artifact.Store }

var _ Artifacts = transcripts{}

// artifacts opens the store of the state folder, or the one that is named.
func (p *plugged) artifacts(ctx context.Context, g Globals) (Artifacts, error) {
	cfg, err := home(g.Config)
	if err != nil {
		return nil, err
	}
	store, err := host.Artifacts(ctx, cfg.Home, cfg.Artifacts, storeKeys(cfg, p.secrets(cfg)))
	return transcripts{store}, err
}

// storeKeys has the artifact store opened with the keys that this command or
// worker knows.
func storeKeys(cfg *config.Config, secrets func() config.Secrets) artifact.Option {
	return artifact.WithKeys(func() artifact.Keys {
		s := secrets().StoreAt(cfg.Artifacts)
		return artifact.Keys{ID: s.KeyID, Secret: string(s.Secret), Session: string(s.Session)}
	})
}

// Transcript opens what the agent printed in one of its attempts.
func (t transcripts) Transcript(ctx context.Context, run string, num, attempt int, offset int64) (io.ReadCloser, error) {
	r, _, err := t.store.ReadLog(ctx, artifact.RunKey(run, num, fork.TranscriptName(attempt)), offset)
	return r, err
}

// Refused opens the list that the fork's door left.
func (t transcripts) Refused(ctx context.Context, run string, num int) (io.ReadCloser, error) {
	return t.store.Get(ctx, artifact.RunKey(run, num, fork.RefusedName))
}

// Verified opens what the verification printed.
func (t transcripts) Verified(ctx context.Context, run string, num int) (io.ReadCloser, error) {
	return t.store.Get(ctx, artifact.RunKey(run, num, fork.VerifyName))
}

// books opens the ledger of the state folder, or the one that is named.
func (p *plugged) books(ctx context.Context, g Globals) (Books, error) {
	r, err := ledger.OpenReader(ctx, ledger.Options{Dir: host.LedgerDir(g.Config.Home), URL: string(g.Config.LedgerURL)})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// work opens the git store of the state folder.
func (p *plugged) work(_ context.Context, g Globals) (Work, error) {
	cfg, err := home(g.Config)
	if err != nil {
		return nil, err
	}
	return host.Repo(cfg.Home, nil, slog.New(slog.DiscardHandler)), nil
}
