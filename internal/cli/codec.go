package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/payload"
)

// newCodec makes the "codec" command.
func (p *plugged) newCodec(env *Env) *cobra.Command {
	var port int
	var page string
	cmd := &cobra.Command{
		Use:     "codec",
		GroupID: groupService,
		Short:   "Let Temporal's web page show sealed payloads",
		Long: `Codec opens what ` + payload.Variable + ` has sealed, for Temporal's
web page in a browser of this host, until it is interrupted. Write the address
that it prints into the page's codec settings. Keep the address to yourself:
whoever has it, and an account on this host, can read what the page can.` + exits(exitOK, exitFailed, exitUsage),
		Example: `  sandbox-temporal codec --ui http://127.0.0.1:8080`,
		Args:    args(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.runCodec(cmd.Context(), port, page)
		},
	}
	cmd.Flags().IntVar(&port, "port", 8081, "the `PORT` to answer on; 0: any free one")
	cmd.Flags().StringVar(&page, "ui", "http://127.0.0.1:8080", "the `ORIGIN` of the web page; no other may ask")
	return cmd
}

func (p *plugged) runCodec(ctx context.Context, port int, page string) error {
	keys, err := p.keys()
	if err != nil {
		return err
	}
	if keys == nil {
		return usage("Set it to the keys that the runs were sealed with.", "%s is not set: nothing is sealed", payload.Variable)
	}
	ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return fault.New("codec", fault.Conflict, "%w", err).Hinted("Choose another port with --port (0: any free one).")
	}
	srv := &http.Server{Handler: keys.Handler(page), ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { _ = srv.Close() })()
	fmt.Fprintf(p.env.Stdout, "http://%s%s\n", ln.Addr(), keys.Path())
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fault.New("codec", fault.Internal, "%w", err)
	}
	return nil
}
