package e2btest

import (
	"cmp"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// maxBody bounds the body of a request to the control plane.
const maxBody = 1 << 20

// control answers what is asked of E2B's API.
func (s *Server) control(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/health" {
		w.WriteHeader(http.StatusOK)
		return
	}
	key := r.Header.Get("X-Api-Key")
	if subtle.ConstantTimeCompare([]byte(key), []byte(s.Key)) != 1 {
		fail(w, http.StatusUnauthorized, "Invalid API key, please visit https://e2b.dev/docs/api-key for more information.")
		return
	}
	// A snapshot's id has a slash in it, so segments are told apart before
	// they are decoded.
	var segments []string
	for seg := range strings.SplitSeq(strings.Trim(r.URL.EscapedPath(), "/"), "/") {
		seg, err := url.PathUnescape(seg)
		if err != nil {
			fail(w, http.StatusBadRequest, "Invalid path")
			return
		}
		segments = append(segments, seg)
	}
	version := 1
	if segments[0] == "v2" {
		version, segments = 2, segments[1:]
	}
	s.route(w, r, version, segments)
}

// route calls who answers. Methods that exist under one version of a path
// only are not found under the other.
func (s *Server) route(w http.ResponseWriter, r *http.Request, version int, path []string) {
	at := func(n int) string {
		if n < len(path) {
			return path[n]
		}
		return ""
	}
	id := at(1)
	shape := r.Method + " " + at(0)
	switch len(path) {
	case 2:
		shape += "/*"
	case 3:
		shape += "/*/" + at(2)
	}
	switch {
	case shape == "POST sandboxes":
		s.postSandbox(w, r, version)
	case shape == "GET sandboxes":
		s.listSandboxes(w, r)
	case shape == "POST sandboxes/*/connect":
		s.withSandbox(w, r, id, func(v *vm) { s.connectSandbox(w, r, v, version) })
	case version == 2 && shape == "GET sandboxes/*/logs":
		s.withSandbox(w, r, id, func(*vm) { answer(w, http.StatusOK, map[string]any{"logs": []any{}}) })
	case version == 2:
		fail(w, http.StatusNotFound, "no matching operation was found")
	case r.Method == http.MethodGet && at(0) == "sandboxes" && id == "metrics" && len(path) == 2:
		answer(w, http.StatusOK, map[string]any{"sandboxes": map[string]any{}})
	case shape == "GET sandboxes/*":
		s.withSandbox(w, r, id, func(v *vm) { answer(w, http.StatusOK, s.detail(v)) })
	case shape == "DELETE sandboxes/*":
		s.withSandbox(w, r, id, func(v *vm) {
			if !v.kill() {
				noSandbox(w, id)
				return
			}
			w.WriteHeader(http.StatusNoContent)
		})
	case shape == "POST sandboxes/*/timeout":
		s.withSandbox(w, r, id, func(v *vm) { s.setTimeout(w, r, v) })
	case shape == "POST sandboxes/*/refreshes":
		s.withSandbox(w, r, id, func(v *vm) { s.refresh(w, r, v) })
	case shape == "POST sandboxes/*/pause":
		s.withSandbox(w, r, id, func(v *vm) { pauseSandbox(w, r, v) })
	case shape == "POST sandboxes/*/resume":
		s.withSandbox(w, r, id, func(v *vm) { s.resumeSandbox(w, r, v) })
	case shape == "POST sandboxes/*/snapshots":
		s.withSandbox(w, r, id, func(v *vm) { s.postSnapshot(w, r, v) })
	case shape == "POST sandboxes/*/fork":
		s.withSandbox(w, r, id, func(v *vm) { s.forkSandbox(w, r, v) })
	case shape == "PUT sandboxes/*/network":
		s.withSandbox(w, r, id, func(*vm) { w.WriteHeader(http.StatusNoContent) })
	case shape == "GET sandboxes/*/metrics":
		s.withSandbox(w, r, id, func(*vm) { answer(w, http.StatusOK, []any{}) })
	case shape == "GET snapshots":
		s.listSnapshots(w, r)
	case shape == "DELETE templates/*":
		s.deleteTemplate(w, id)
	default:
		fail(w, http.StatusNotFound, "no matching operation was found")
	}
}

// withSandbox finds the sandbox that a path names.
func (s *Server) withSandbox(w http.ResponseWriter, _ *http.Request, id string, f func(v *vm)) {
	if v := s.find(id); v != nil {
		f(v)
		return
	}
	noSandbox(w, id)
}

func noSandbox(w http.ResponseWriter, id string) {
	fail(w, http.StatusNotFound, fmt.Sprintf("Sandbox %q doesn't exist or you don't have access to it", id))
}

// fail answers with an error of the API.
func fail(w http.ResponseWriter, status int, message string) {
	answer(w, status, map[string]any{"code": status, "message": message})
}

func answer(w http.ResponseWriter, status int, body any) {
	b, err := json.Marshal(body)
	if err != nil {
		panic(err) // what we answer can be written down
	}
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	w.WriteHeader(status)
	_, _ = w.Write(b)
}

// refuse answers with what became of a change of state.
func refuse(w http.ResponseWriter, v *vm, err error) {
	switch {
	case errors.Is(err, errGone):
		noSandbox(w, v.id)
	case errors.Is(err, errTooMany):
		fail(w, http.StatusTooManyRequests, full(v.srv.opts.MaxConcurrent))
	case errors.Is(err, errPaused), errors.Is(err, errRuns):
		fail(w, http.StatusConflict, fmt.Sprintf("Sandbox %q: %v", v.id, err))
	default:
		fail(w, http.StatusInternalServerError, err.Error())
	}
}

func full(most int) string {
	return fmt.Sprintf("you have reached the maximum number of concurrent E2B sandboxes (%d). If you need more, please contact us at 'https://e2b.dev/docs/getting-help'", most)
}

// read decodes the body of a request; one that is empty says nothing.
func read(w http.ResponseWriter, r *http.Request, into any) bool {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err == nil && len(b) > 0 {
		err = json.Unmarshal(b, into)
	}
	if err != nil {
		fail(w, http.StatusBadRequest, fmt.Sprintf("Error when parsing request: %v", err))
		return false
	}
	return true
}

// made is what is said of a sandbox to who made it or connects to it.
func (s *Server) made(v *vm) map[string]any {
	m := map[string]any{"sandboxID": v.id, "templateID": v.spec.Template, "clientID": "e2btest", "envdVersion": s.opts.EnvdVersion, "domain": nil}
	if v.token != "" {
		m["envdAccessToken"] = v.token
	}
	return m
}

// listed is what a list says.
func (s *Server) listed(v Sandbox) map[string]any {
	m := v.Metadata
	if m == nil {
		m = map[string]string{}
	}
	return map[string]any{
		"sandboxID": v.ID, "templateID": v.Template, "clientID": "e2btest", "envdVersion": s.opts.EnvdVersion, "state": v.State, "metadata": m,
		"startedAt": v.Started.UTC().Format(time.RFC3339Nano), "endAt": v.End.UTC().Format(time.RFC3339Nano), "cpuCount": 2, "memoryMB": 512, "diskSizeMB": 10240,
	}
}

func (s *Server) detail(v *vm) map[string]any {
	s.mu.Lock()
	info := v.info()
	s.mu.Unlock()
	m := s.listed(info)
	if v.token != "" {
		m["envdAccessToken"] = v.token
	}
	onTimeout := "kill"
	if v.spec.AutoPause {
		onTimeout = "pause"
	}
	m["lifecycle"] = map[string]any{"onTimeout": onTimeout, "autoResume": v.spec.AutoResume.Enabled}
	return m
}

// seconds reads a number of seconds that a request gave, or not.
func (s *Server) seconds(w http.ResponseWriter, given *int, otherwise int) (time.Duration, bool) {
	n := otherwise
	if given != nil {
		n = *given
	}
	life := time.Duration(n) * time.Second
	if n < 0 || s.opts.MaxLifetime > 0 && life > s.opts.MaxLifetime {
		fail(w, http.StatusBadRequest, fmt.Sprintf("Timeout cannot be greater than %v hours", s.opts.MaxLifetime.Hours()))
		return 0, false
	}
	return life, true
}

func (s *Server) postSandbox(w http.ResponseWriter, r *http.Request, version int) {
	var sp spec
	if !read(w, r, &sp) {
		return
	}
	otherwise := 15
	if version == 2 {
		sp.Secure, otherwise = true, 300
	}
	life, ok := s.seconds(w, sp.Timeout, otherwise)
	if !ok {
		return
	}
	if sp.AutoResume.Enabled && !sp.AutoPause {
		fail(w, http.StatusBadRequest, "autoResume requires autoPause")
		return
	}
	base, ok := s.template(sp.Template)
	if !ok {
		fail(w, http.StatusNotFound, fmt.Sprintf("template '%s' not found", sp.Template))
		return
	}
	v, err := s.create(sp, base, life)
	if errors.Is(err, errTooMany) {
		fail(w, http.StatusTooManyRequests, full(s.opts.MaxConcurrent))
		return
	}
	if err != nil {
		fail(w, http.StatusInternalServerError, err.Error())
		return
	}
	answer(w, http.StatusCreated, s.made(v))
}

// template returns the folder of files that a template or snapshot stands
// for; empty: those of every template.
func (s *Server) template(id string) (dir string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains(s.opts.Templates, id) {
		return "", true
	}
	for _, n := range s.snapshots {
		if n.id == id || strings.TrimSuffix(n.id, ":default") == id || n.name == id && id != "" {
			return n.dir, true
		}
	}
	return "", false
}

func (s *Server) connectSandbox(w http.ResponseWriter, r *http.Request, v *vm, version int) {
	var body struct {
		Timeout *int `json:"timeout"`
	}
	if !read(w, r, &body) {
		return
	}
	if version == 1 && body.Timeout == nil {
		fail(w, http.StatusBadRequest, "request body has an error: property \"timeout\" is missing")
		return
	}
	life, ok := s.seconds(w, body.Timeout, 300)
	if !ok {
		return
	}
	resumed, err := v.resume(life)
	if err != nil {
		refuse(w, v, err)
		return
	}
	status := http.StatusOK
	if resumed {
		status = http.StatusCreated
	}
	answer(w, status, s.made(v))
}

func (s *Server) resumeSandbox(w http.ResponseWriter, r *http.Request, v *vm) {
	var body struct {
		Timeout *int `json:"timeout"`
	}
	if !read(w, r, &body) {
		return
	}
	if body.Timeout == nil {
		fail(w, http.StatusBadRequest, "Error when parsing request: the body is missing")
		return
	}
	life, ok := s.seconds(w, body.Timeout, 15)
	if !ok {
		return
	}
	resumed, err := v.resume(life)
	if err == nil && !resumed {
		err = errRuns
	}
	if err != nil {
		refuse(w, v, err)
		return
	}
	answer(w, http.StatusCreated, s.made(v))
}

func pauseSandbox(w http.ResponseWriter, r *http.Request, v *vm) {
	var body struct {
		Memory *bool `json:"memory"`
	}
	if !read(w, r, &body) {
		return
	}
	if body.Memory != nil && !*body.Memory {
		fail(w, http.StatusBadRequest, "this server cannot pause without memory")
		return
	}
	if err := v.pause(); err != nil {
		refuse(w, v, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// setTimeout moves the end, both ways. A paused sandbox has none.
func (s *Server) setTimeout(w http.ResponseWriter, r *http.Request, v *vm) {
	var body struct {
		Timeout *int `json:"timeout"`
	}
	if !read(w, r, &body) {
		return
	}
	if body.Timeout == nil || *body.Timeout < 0 {
		fail(w, http.StatusBadRequest, "request body has an error: property \"timeout\" is missing or negative")
		return
	}
	s.extend(w, v, time.Duration(*body.Timeout)*time.Second, true)
}

func (s *Server) refresh(w http.ResponseWriter, r *http.Request, v *vm) {
	var body struct {
		Duration int `json:"duration"`
	}
	if !read(w, r, &body) {
		return
	}
	if body.Duration < 0 || body.Duration > 3600 {
		fail(w, http.StatusBadRequest, "duration must be between 0 and 3600")
		return
	}
	s.extend(w, v, time.Duration(max(body.Duration, 15))*time.Second, false)
}

func (s *Server) extend(w http.ResponseWriter, v *vm, life time.Duration, shorten bool) {
	if err := v.enter(); err != nil {
		noSandbox(w, v.id)
		return
	}
	defer v.leave()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opts.MaxLifetime > 0 && time.Since(v.started) > s.opts.MaxLifetime {
		fail(w, http.StatusBadRequest, "Max instance length exceeded")
		return
	}
	if shorten || time.Until(v.end) < life {
		v.setEnd(life)
	}
	w.WriteHeader(http.StatusNoContent)
}

// listSandboxes answers with a page of those that the filters leave.
func (s *Server) listSandboxes(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	want, err := filters(q.Get("metadata"))
	if err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return
	}
	states := strings.Split(cmp.Or(strings.Join(q["state"], ","), Running+","+Paused), ",")
	var after time.Time
	if text := q.Get("startedAfter"); text != "" {
		if after, err = time.Parse(time.RFC3339Nano, text); err != nil {
			fail(w, http.StatusBadRequest, "startedAfter is no time")
			return
		}
	}
	s.mu.Lock()
	var all []Sandbox
	total := 0
	for _, v := range s.sorted() {
		if v.hidden > 0 {
			v.hidden--
			continue
		}
		if !has(v.spec.Metadata, want) || q.Get("template") != "" && q.Get("template") != v.spec.Template || v.started.Before(after) {
			continue
		}
		if v.state == Running {
			total++
		}
		if slices.Contains(states, v.state) {
			all = append(all, v.info())
		}
	}
	s.mu.Unlock()
	// The newest comes first, unless it is asked for otherwise.
	backwards := q.Get("order") != "asc"
	if backwards {
		slices.Reverse(all)
	}
	page, ok := paged(w, q, all, backwards, func(v Sandbox) string { return place(v.Created, v.ID) })
	if !ok {
		return
	}
	out := []map[string]any{}
	for _, v := range page {
		out = append(out, s.listed(v))
	}
	w.Header().Set("X-Total-Running", fmt.Sprint(total))
	answer(w, http.StatusOK, out)
}
