//go:build noembed

package engine

import (
	"context"
	"errors"
	"net/http"
)

// Embedded says whether this build holds the server. Start looks at it first
// and calls nothing below without it.
const Embedded = false

var errNoembed = errors.New("built without the server")

func builtSchema() (schema, error) { return schema{}, errNoembed }

func launch(context.Context, launchOptions) (interface{ Stop() error }, error) {
	return nil, errNoembed
}

func webHandler(string, string) (http.Handler, error) { return nil, errNoembed }
