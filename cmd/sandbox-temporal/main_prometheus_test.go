package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sandbox-temporal/sandbox-temporal/internal/endpoint"
)

// cmdPrometheus starts a real Prometheus server that scrapes the engine every
// half second with the alerts of deploy/: prometheus.
func cmdPrometheus(ts *testscript.TestScript, _ bool, _ []string) {
	ep, err := endpoint.Read(ts.Getenv("STATE"))
	ts.Check(err)
	target, err := url.Parse(ep.Metrics)
	ts.Check(err)
	rules, err := filepath.Abs("../../deploy/prometheus/alerts.yml")
	ts.Check(err)
	dir := ts.MkAbs("prometheus")
	ts.Check(os.MkdirAll(dir, 0o700))
	config := fmt.Sprintf("global: {scrape_interval: 500ms, evaluation_interval: 1s}\nrule_files: [%q]\nscrape_configs:\n- job_name: sandbox-temporal\n  static_configs: [{targets: [%q]}]\n", rules, target.Host)
	ts.Check(os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	addr := ln.Addr().String()
	ts.Check(ln.Close())
	program, err := exec.LookPath("prometheus")
	ts.Check(err)
	log, err := os.Create(filepath.Join(dir, "log"))
	ts.Check(err)
	cmd := exec.Command(program, "--config.file="+filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+addr)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		// The signal comes when the thread ends that started it, and other
		// sessions' machines of E2B are threads that end.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(ended)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it is killed in the end
		}
	}()
	ts.Check(<-started)
	ts.Defer(func() {
		_ = cmd.Process.Kill()
		<-ended
		_ = log.Close()
	})
	of(ts).prometheus = "http://" + addr
	// Until it has looked once.
	if err := eventually(time.Minute, func() error { return of(ts).asked(`up{job="sandbox-temporal"} == 1`) }); err != nil {
		said, _ := os.ReadFile(log.Name())
		ts.Fatalf("%v\n%s", err, said)
	}
}

// cmdPanels runs every query of a dashboard until it returns data: panels FILE.
func cmdPanels(ts *testscript.TestScript, _ bool, args []string) {
	b, err := os.ReadFile(filepath.Join("../../deploy/grafana/dashboards", args[0]))
	ts.Check(err)
	var d struct {
		Panels []struct {
			Title, Type string
			Targets     []struct{ Expr string }
		}
		Templating struct {
			List []struct {
				Type       string
				Definition string
			}
		}
	}
	ts.Check(json.Unmarshal(b, &d))
	s := of(ts)
	queries := 0
	var failed []string
	ask := func(title, query string) {
		queries++
		if err := eventually(20*time.Second, func() error { return s.asked(query) }); err != nil {
			failed = append(failed, title+": "+err.Error())
		}
	}
	for _, p := range d.Panels {
		if p.Type != "row" && len(p.Targets) == 0 {
			ts.Fatalf("the panel %s asks nothing", p.Title)
		}
		for _, t := range p.Targets {
			ask(p.Title, strings.NewReplacer("$__rate_interval", "5m", "$__range", "15m", "$instance", ".*").Replace(t.Expr))
		}
	}
	for _, v := range d.Templating.List {
		if v.Type == "query" {
			metric, _, ok := strings.Cut(strings.TrimPrefix(v.Definition, "label_values("), ",")
			if !ok {
				ts.Fatalf("cannot ask for the variable %s", v.Definition)
			}
			ask("variable", metric)
		}
	}
	if len(failed) > 0 {
		ts.Fatalf("%d of %d queries return nothing:\n%s", len(failed), queries, strings.Join(failed, "\n"))
	}
	if queries < 20 {
		ts.Fatalf("only %d queries", queries)
	}
	ts.Logf("%d queries return data", queries)
}

// cmdQuery waits for a query to return data: query EXPRESSION.
func cmdQuery(ts *testscript.TestScript, neg bool, args []string) {
	err := eventually(30*time.Second, func() error {
		if err := of(ts).asked(args[0]); (err == nil) == neg {
			return fmt.Errorf("%s (negated: %v): %w", args[0], neg, errors.Join(err, errors.New("not as wanted")))
		}
		return nil
	})
	ts.Check(err)
}

// asked is nil when Prometheus answers the query with at least one number.
func (s *session) asked(query string) error {
	res, err := http.Get(s.prometheus + "/api/v1/query?" + url.Values{"query": {query}}.Encode())
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	var a struct {
		Status, Error string
		Data          struct {
			Result []struct {
				Value [2]any
			}
		}
	}
	if err := json.Unmarshal(b, &a); err != nil {
		return fmt.Errorf("%s: %w", b, err)
	}
	if a.Status != "success" {
		return fmt.Errorf("%s: %s", query, a.Error)
	}
	for _, r := range a.Data.Result {
		text, _ := r.Value[1].(string)
		if v, err := strconv.ParseFloat(text, 64); err == nil && !math.IsNaN(v) {
			return nil
		}
	}
	return fmt.Errorf("no data: %s", query)
}

// eventually tries f until it returns nil.
func eventually(limit time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}
