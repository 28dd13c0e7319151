package gateway

import (
	"context"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/openai"
)

const messagesPath = "/v1/messages"

// An errand is what a call is for.
type errand int

// The errands.
const (
	nowhere    errand = iota // it does not pass
	free                     // it costs nothing
	asking                   // the model, for money
	making                   // a message batch, for money
	listing                  // the fork's batches
	looking                  // at a batch
	cancelling               // one
	fetching                 // its results
	deleting                 // it
)

// reads reports whether the errand has a body that is passed on.
func (e errand) reads() bool { return e == asking || e == making || e == free }

// route says whose API a call is for and what for, with the name of a batch where
// it is about one. Everything that is not named here is refused: other parts of
// the APIs cost money in ways that are not metered, or manage the account.
func route(r *http.Request) (of Maker, what errand, batch string) {
	if r.URL.RawPath != "" { // an escaped path means something else to others
		return Anthropic, nowhere, ""
	}
	when := func(method string, e errand) errand {
		if r.Method == method {
			return e
		}
		return nowhere
	}
	switch path := r.URL.Path; path {
	case messagesPath:
		return Anthropic, when(http.MethodPost, asking), ""
	case messagesPath + "/count_tokens":
		return Anthropic, when(http.MethodPost, free), ""
	case batchesPath:
		return Anthropic, max(when(http.MethodPost, making), when(http.MethodGet, listing)), ""
	case string(openai.Responses), string(openai.Chat):
		return OpenAI, when(http.MethodPost, asking), ""
	case "/v1/models":
		return Anthropic, when(http.MethodGet, free), ""
	default:
		if id, ok := strings.CutPrefix(path, "/v1/models/"); ok && modelID(id) {
			return Anthropic, when(http.MethodGet, free), ""
		}
		name, ok := strings.CutPrefix(path, batchesPath+"/")
		if !ok {
			return Anthropic, nowhere, ""
		}
		id, deed, _ := strings.Cut(name, "/")
		switch {
		case !batchID(id):
			return Anthropic, nowhere, ""
		case name == id:
			what = max(when(http.MethodGet, looking), when(http.MethodDelete, deleting))
		case deed == "cancel":
			what = when(http.MethodPost, cancelling)
		case deed == "results":
			what = when(http.MethodGet, fetching)
		}
		return Anthropic, what, id
	}
}

// notPassed says that a call does not pass, and why where that helps.
func notPassed(r *http.Request) *refusal {
	text := "The gateway does not pass " + strconv.Quote(shorten(r.Method+" "+r.URL.Path)) + " on"
	switch first, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, openAIPath+"/"), "/"); first {
	case "batches", "files", "uploads":
		text += ": a batch of OpenAI's API is a file that was sent before, and what is in it is not metered here"
	}
	return forbid(http.StatusNotFound, "not_found_error", text+".")
}

func modelID(id string) bool {
	return len(id) > 0 && len(id) <= 200 && strings.Trim(id, ".") != "" &&
		strings.Trim(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:@") == ""
}

// ServeHTTP answers one call of an agent. See the package's introduction. It
// takes every good token, whatever way it is for, and whoever uses it says who
// can reach it.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	scheme := "http://"
	if r.TLS != nil {
		scheme = "https://"
	}
	g.handle(w, r, scheme+r.Host, func(string, *tenant) bool { return true })
}

// handle answers a call. Outside is the gateway's address as the agent sees it.
// Fits says whether a token may come the way that the call came, first by its
// text alone, then with its owner.
func (g *Gateway) handle(w http.ResponseWriter, r *http.Request, outside string, fits func(token string, owner *tenant) bool) {
	gr, refused := g.admit(r, fits)
	if refused != nil {
		g.turnAway(w, refused)
		return
	}
	defer g.leave(gr)
	of, what, id := route(r)
	if what == nowhere {
		g.turnAway(w, notPassed(r))
		return
	}
	var batch *ledger.Batch
	if id != "" {
		if batch, refused = g.batch(r.Context(), gr.tenant, id); refused != nil {
			g.turnAway(w, refused)
			return
		}
	}
	var body []byte
	if what.reads() {
		if body, refused = g.body(w, r); refused != nil {
			g.turnAway(w, refused)
			return
		}
	}
	whole := time.Now()
	cred, base, refused := g.authority(r.Context(), of)
	if refused != nil {
		if refused.status == http.StatusUnauthorized {
			g.deny(gr.tenant)
		}
		g.turnAway(w, refused)
		return
	}
	f := &forwarding{g: g, w: w, out: http.NewResponseController(w), in: r, maker: of, cred: cred, base: base, body: body, tenant: gr.tenant, patience: gr.patience,
		path: r.URL.Path, query: r.URL.RawQuery, outside: outside}
	held := false
	switch what {
	case asking:
		if refused = f.meter(gr); refused == nil {
			held = f.call.held
		}
	case making:
		held, refused = f.meterBatch(gr)
	}
	if refused != nil {
		g.turnAway(w, refused)
		return
	}
	if (what == asking || what == making) && !held {
		g.observer.admitted(time.Since(whole))
	}
	defer f.traced()()
	switch what {
	case asking, free:
		f.run()
	case making:
		f.make()
	default:
		f.errand(what, batch)
	}
}

// note says why a call was not served, other than for want of money.
func (g *Gateway) note(t *tenant, what string, args ...any) { g.say(&t.noted, t, what, args...) }

func shorten(s string) string { return s[:min(len(s), 200)] }

// admit finds out whose call it is, and takes one of the fork's places. A token
// that comes by somebody else's door is stolen.
func (g *Gateway) admit(r *http.Request, fits func(token string, owner *tenant) bool) (*grant, *refusal) {
	for _, token := range bearer(r.Header) {
		if !fits(token, nil) {
			continue // the ledger need not be asked
		}
		gr, refused := g.lookup(r.Context(), ledger.HashOf(token))
		if refused != nil {
			return nil, refused
		}
		if gr == nil || !fits(token, gr.tenant) {
			continue
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		switch {
		case g.closed:
			return nil, refuse(http.StatusServiceUnavailable, "api_error", "The gateway is closing.")
		case gr.revoked: // in the very moment
			return nil, refuseToken()
		case gr.tenant.active >= g.limits.parallel:
			return nil, comeAgain(time.Second, "This fork has "+strconv.Itoa(gr.tenant.active)+" calls under way, which is the most.")
		}
		gr.tenant.active++
		g.active.Add(1)
		return gr, nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, refuse(http.StatusServiceUnavailable, "api_error", "The gateway is closing.")
	}
	g.unknown++
	if seldom(g.unknown) {
		g.log.Info("call refused: no good token", "path", shorten(r.URL.Path), "refused", g.unknown)
	}
	return nil, refuseToken()
}

// lookup returns the grant of a token, and nil for one that is not good. The
// ledger knows; what it said is trusted for a while, for calls that cost money
// are looked at once more when they are reserved.
func (g *Gateway) lookup(ctx context.Context, hash ledger.Hash) (*grant, *refusal) {
	g.mu.Lock()
	gr := g.tokens[hash]
	fresh := gr != nil && (gr.revoked || !g.shared || time.Since(gr.checked) < g.limits.trust)
	closed := g.closed
	g.mu.Unlock()
	switch {
	case fresh && gr.revoked, closed:
		return nil, nil
	case fresh:
		return gr, nil
	}
	select {
	case g.lookups <- struct{}{}:
		defer func() { <-g.lookups }()
	case <-ctx.Done():
		return nil, refuse(http.StatusServiceUnavailable, "api_error", "The call was given up.")
	}
	run, num, err := g.ledger.Holder(ctx, hash)
	if err != nil && fault.KindOf(err) != fault.NotFound {
		g.log.Warn("a token cannot be looked up", "error", err)
		return nil, refuse(http.StatusServiceUnavailable, "api_error", "The gateway cannot read its ledger.")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	gr = g.tokens[hash] // it may have been granted or revoked meanwhile
	switch {
	case err != nil && gr != nil:
		gr.revoked = true
		if gr.tenant.grant == gr {
			gr.tenant.grant = nil
		}
		return nil, nil
	case err != nil, gr != nil && gr.revoked:
		return nil, nil
	case gr != nil:
		gr.checked = time.Now()
		return gr, nil
	}
	t := g.tenant(run, num)
	t.dismiss()
	return g.keep(hash, t), nil
}

func (g *Gateway) leave(gr *grant) {
	g.mu.Lock()
	t := gr.tenant
	if t.active--; t.active == 0 && t.quiet != nil {
		close(t.quiet)
		t.quiet = nil
	}
	g.mu.Unlock()
	g.active.Done()
}

// body reads the whole request: what it costs has to be known before it goes
// out, and a slow agent must not hold an upstream connection.
func (g *Gateway) body(w http.ResponseWriter, r *http.Request) ([]byte, *refusal) {
	if r.Method == http.MethodGet {
		return nil, nil
	}
	if e := r.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		return nil, forbid(http.StatusUnsupportedMediaType, "invalid_request_error", "The gateway reads no compressed requests.")
	}
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		return nil, forbid(http.StatusUnsupportedMediaType, "invalid_request_error", "The gateway passes JSON only.")
	}
	tooLarge := forbid(http.StatusRequestEntityTooLarge, "request_too_large", "The request has more than "+strconv.FormatInt(g.limits.body, 10)+" bytes.")
	if r.ContentLength > g.limits.body {
		return nil, tooLarge
	}
	// Not every server can set a deadline; the one in Serve does.
	rc := http.NewResponseController(w)
	rc.SetReadDeadline(time.Now().Add(g.limits.upload)) //nolint:errcheck // see above
	defer rc.SetReadDeadline(time.Time{})               //nolint:errcheck // see above
	var (
		b   []byte
		err error
	)
	limited := http.MaxBytesReader(w, r.Body, g.limits.body)
	if r.ContentLength > 0 {
		b = make([]byte, r.ContentLength)
		_, err = io.ReadFull(limited, b)
	} else {
		b, err = io.ReadAll(limited)
	}
	if _, big := errors.AsType[*http.MaxBytesError](err); big {
		return nil, tooLarge
	}
	if err != nil {
		return nil, refuse(http.StatusRequestTimeout, "invalid_request_error", "The request did not come whole.")
	}
	return b, nil
}

// authority asks for the real credentials of the maker and where they are good.
// Those of others are left out of what it returns.
func (g *Gateway) authority(ctx context.Context, of Maker) (Credentials, *url.URL, *refusal) {
	cred, err := g.credentials(ctx)
	if err != nil {
		g.log.Warn("the credentials for the model API cannot be had", "error", cred.redact(err.Error()))
		if fault.KindOf(err) == fault.Denied {
			return cred, nil, forbid(http.StatusUnauthorized, "authentication_error", "The gateway may not read its credentials for the model API.")
		}
		return cred, nil, refuse(http.StatusServiceUnavailable, "api_error", "The gateway cannot get its credentials for the model API.")
	}
	prefix, standard := "ANTHROPIC", anthropicURL
	if of == OpenAI {
		prefix, standard = "OPENAI", openAIURL
		cred = Credentials{AuthToken: cred.OpenAIKey, BaseURL: cred.OpenAIBaseURL}
	}
	cred.OpenAIKey, cred.OpenAIBaseURL = "", ""
	cred.APIKey, cred.AuthToken = strings.TrimSpace(cred.APIKey), strings.TrimSpace(cred.AuthToken)
	if cred.APIKey == "" && cred.AuthToken == "" {
		return cred, nil, forbid(http.StatusUnauthorized, "authentication_error",
			"There is no "+prefix+"_API_KEY: set it in the environment of the command that starts the run, or of the worker.")
	}
	for _, s := range cred.secrets() {
		if strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c > '~' }) {
			return cred, nil, forbid(http.StatusUnauthorized, "authentication_error", "The API key has characters that no key has.")
		}
	}
	if cred.BaseURL == "" {
		cred.BaseURL = standard
	}
	base, err := url.Parse(cred.BaseURL)
	if err != nil || base.Scheme != "http" && base.Scheme != "https" || base.Host == "" || base.User != nil || base.RawQuery != "" || base.Fragment != "" {
		return cred, nil, forbid(http.StatusNotFound, "not_found_error",
			prefix+"_BASE_URL is no http or https URL of a host and a path.")
	}
	return cred, base, nil
}

func (f *forwarding) read() (*request, error) {
	if f.maker == OpenAI {
		return readOpenAI(f.in.URL.Path, f.body)
	}
	return readRequest(f.body)
}

// meter reads what the call may cost and reserves it.
func (f *forwarding) meter(gr *grant) *refusal {
	q, err := f.read()
	if err != nil {
		return forbid(http.StatusBadRequest, "invalid_request_error", "The gateway cannot read the request: "+err.Error()+".")
	}
	if q.maxTokens < 1 {
		return forbid(http.StatusBadRequest, "invalid_request_error", "The request has no max_tokens.")
	}
	g := f.g
	if refused := g.unpriced(q, gr); refused != nil {
		return refused
	}
	key, marks := tenantKey{gr.tenant.run, gr.tenant.num}, g.prompts.mark(f.body, q)
	known, ok := g.prompts.bound(key, q, marks)
	if !ok {
		known = -1
	}
	c := &call{
		g:       g,
		tenant:  gr.tenant,
		model:   shorten(q.model),
		path:    f.in.URL.Path,
		attempt: retries(f.in.Header),
		ask:     g.prices.estimate(q, g.maxOutput, known),
		marks:   marks,
		started: time.Now(),
	}
	if refused := g.reserve(f.in.Context(), c, gr.hash); refused != nil {
		return refused
	}
	f.request, f.call = q, c
	f.body = q.clamp(f.body, c.Output)
	return nil
}

// unpriced refuses what would be billed at a price that the table does not
// have. An unknown model is "not found", as upstream would say; the others get
// 403, which agents take for an answer at once.
func (g *Gateway) unpriced(q *request, gr *grant) *refusal {
	var why string
	for _, name := range q.models() {
		if _, known := g.prices.lookup(name); !known && !g.allowUnpriced {
			why = "The model " + strconv.Quote(shorten(name)) + " has no price, so calls to it cannot be metered."
			g.note(gr.tenant, "call refused: unpriced model", "model", shorten(name))
			return forbid(http.StatusNotFound, "not_found_error", why)
		}
	}
	switch {
	case q.unpriced != "":
		why = "There is no price here for " + q.unpriced + ", so such calls cannot be metered."
	case q.fast:
		why = "Fast mode has no price here, so calls in it cannot be metered."
	case q.regional:
		why = "Inference in a chosen place has no price here, so calls with inference_geo cannot be metered."
	case q.advisor:
		why = "A tool that asks another model has no price here, so calls with it cannot be metered."
	default:
		return nil
	}
	g.note(gr.tenant, "call refused: unpriced feature", "why", why)
	return forbid(http.StatusForbidden, "permission_error", why)
}
