package e2btest_test

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

func TestOnlyTheKeyOpens(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	for _, key := range []string{"", "e2b_0000", c.s.Key + "0"} {
		req := c.request(http.MethodGet, c.s.APIURL()+"/v2/sandboxes", "")
		req.Header.Set("X-API-Key", key)
		if a := c.send(req); a.status != http.StatusUnauthorized || !strings.Contains(a.body, `"code":401`) {
			t.Errorf("key %q: %d: %s", key, a.status, a.body)
		}
	}
}

func TestBothVersionsMakeSandboxes(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	for _, row := range []struct {
		path, body string
		token      bool
		life       time.Duration
	}{
		{"/sandboxes", plain, false, 15 * time.Second},
		{"/sandboxes", `{"templateID":"claude","secure":true,"timeout":100}`, true, 100 * time.Second},
		{"/v2/sandboxes", plain, true, 300 * time.Second},
	} {
		b := c.box(c.must(http.StatusCreated, http.MethodPost, row.path, row.body).body)
		if (b.Token != "") != row.token {
			t.Errorf("%s %s: token %q", row.path, row.body, b.Token)
		}
		info := c.s.Sandboxes()[0]
		if got := info.End.Sub(info.Created).Round(time.Second); got != row.life {
			t.Errorf("%s %s lives for %v, want %v", row.path, row.body, got, row.life)
		}
		if got := b.run("echo it works"); got != "it works\n" {
			t.Errorf("%s: %q", row.path, got)
		}
		c.must(http.StatusNoContent, http.MethodDelete, b.path(""), "")
		c.must(http.StatusNotFound, http.MethodDelete, b.path(""), "")
	}
}

func TestWhatCannotBeMadeIsRefused(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{MaxLifetime: time.Hour})}
	for body, want := range map[string]int{
		`{"templateID":"none"}`:                404,
		`{}`:                                   404,
		`{"templateID":`:                       400,
		`{"templateID":"base","timeout":-1}`:   400,
		`{"templateID":"base","timeout":3601}`: 400,
		`{"templateID":"base","autoResume":{"enabled":true}}`:    400,
		`{"templateID":"base","metadata":{"no text":[1,2,3,4]}}`: 400,
	} {
		c.must(want, http.MethodPost, "/v2/sandboxes", body)
	}
	if left := c.s.Sandboxes(); len(left) > 0 {
		t.Errorf("sandboxes were made: %v", left)
	}
}

// listed returns the ids of a list, page by page.
func (c client) listed(query url.Values, between func()) []string {
	c.t.Helper()
	var ids []string
	for {
		a := c.must(http.StatusOK, http.MethodGet, "/v2/sandboxes?"+query.Encode(), "")
		var page []struct{ SandboxID string }
		decode(c.t, a.body, &page)
		for _, p := range page {
			ids = append(ids, p.SandboxID)
		}
		next := a.header.Get("X-Next-Token")
		if next == "" {
			return ids
		}
		query.Set("nextToken", next)
		if between != nil {
			between()
		}
	}
}

func TestPagesHoldEachOneOnceAlsoWhileSomeGo(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	var want []string
	for range 250 {
		want = append(want, c.create(plain).ID)
	}
	slices.Reverse(want) // the newest comes first
	if diff := cmp.Diff(want, c.listed(url.Values{}, nil)); diff != "" {
		t.Error(diff)
	}
	gone := 0
	got := c.listed(url.Values{"limit": {"50"}}, func() {
		// The last of the page before: what the next page begins after.
		last := want[50*(gone+1)-1]
		gone++
		c.must(http.StatusNoContent, http.MethodDelete, "/sandboxes/"+last, "")
	})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, limit := range []string{"0", "101", "x"} {
		c.must(http.StatusBadRequest, http.MethodGet, "/v2/sandboxes?limit="+limit, "")
	}
}

func TestMetadataIsDecodedAsOftenAsItIsEncoded(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	c.create(`{"templateID":"base","metadata":{"k":"other"}}`)
	b := c.create(`{"templateID":"base","metadata":{"k/&":"a+b %20=c","n":"1"}}`)
	pair := url.QueryEscape("k/&") + "=" + url.QueryEscape("a+b %20=c")
	if got := c.listed(url.Values{"metadata": {url.QueryEscape(pair + "&n=1")}}, nil); !slices.Equal(got, []string{b.ID}) {
		t.Errorf("got %v, want %s", got, b.ID)
	}
	// Half of that is something else: a client that forgets it learns so.
	if got := c.listed(url.Values{"metadata": {"n=1&k=a+b"}}, nil); got != nil {
		t.Errorf("got %v", got)
	}
	c.must(http.StatusBadRequest, http.MethodGet, "/v2/sandboxes?metadata=novalue", "")
}

func TestTimeoutMovesTheEndAndConnectOnlyExtends(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{MaxLifetime: time.Hour})}
	b := c.create(plain)
	left := func() time.Duration { return time.Until(c.s.Sandboxes()[0].End).Round(time.Minute) }
	for _, row := range []struct {
		path, body string
		status     int
		want       time.Duration
	}{
		{b.path("/timeout"), `{"timeout":1800}`, 204, 30 * time.Minute},
		{b.path("/timeout"), `{"timeout":600}`, 204, 10 * time.Minute},
		{b.path("/connect"), `{"timeout":60}`, 200, 10 * time.Minute},
		{b.path("/connect"), `{"timeout":1200}`, 200, 20 * time.Minute},
		{b.path("/connect"), `{}`, 400, 20 * time.Minute},
		{"/v2" + b.path("/connect"), `{}`, 200, 20 * time.Minute},
		{b.path("/refreshes"), `{"duration":60}`, 204, 20 * time.Minute},
		{b.path("/refreshes"), `{"duration":2400}`, 204, 40 * time.Minute},
		{b.path("/refreshes"), `{"duration":4000}`, 400, 40 * time.Minute},
		{b.path("/timeout"), `{"timeout":100000}`, 204, time.Hour}, // as the plan has it
		{b.path("/resume"), `{"timeout":60}`, 409, time.Hour},
	} {
		c.must(row.status, http.MethodPost, row.path, row.body)
		if got := left(); got != row.want {
			t.Errorf("after %s %s %v are left, want %v", row.path, row.body, got, row.want)
		}
	}
}

func TestASandboxEndsByItself(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	begin := time.Now()
	b := c.create(`{"templateID":"base","timeout":1}`)
	until(t, "the sandbox to be gone", func() bool { return len(c.s.Sandboxes()) == 0 })
	if d := time.Since(begin); d < time.Second {
		t.Errorf("it was gone after %v", d)
	}
	c.must(http.StatusNotFound, http.MethodGet, b.path(""), "")
	if a := b.send(b.data(http.MethodGet, "/health", "")); a.status != http.StatusBadGateway || !strings.Contains(a.body, "The sandbox was not found") {
		t.Errorf("health: %d: %s", a.status, a.body)
	}
}

func TestASandboxPausesAndResumesByItself(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	b := c.create(`{"templateID":"base","timeout":1,"autoPause":true,"autoResume":{"enabled":true}}`)
	until(t, "the sandbox to pause", func() bool { return c.s.Sandboxes()[0].State == e2btest.Paused })
	if got := b.run("echo awake"); got != "awake\n" {
		t.Errorf("%q", got)
	}
	if got := time.Until(c.s.Sandboxes()[0].End).Round(time.Minute); got != 5*time.Minute {
		t.Errorf("resumed for %v", got)
	}
}

func TestPauseHoldsEveryProcessAndCutsEveryConnection(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	b := c.create(plain)
	// One in a group of its own, and one that forks all the time.
	b.run(`(setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > /tmp/far; (true); done' > /dev/null 2>&1 &)`)
	s := b.start(`i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done`)
	s.pid()
	until(t, "both run", func() bool { return b.read("/tmp/far", "").status == http.StatusOK })
	c.must(http.StatusNoContent, http.MethodPost, b.path("/pause"), `{"memory":true}`)
	if _, _, _, _, err := s.rest(); err == nil {
		t.Error("the stream of a paused sandbox ended well")
	}
	c.must(http.StatusConflict, http.MethodPost, b.path("/pause"), "")
	for path, body := range map[string]string{"/snapshots": "{}", "/fork": `{"count":1}`} {
		c.must(http.StatusConflict, http.MethodPost, b.path(path), body)
	}
	c.must(http.StatusNotFound, http.MethodPost, b.path("/timeout"), `{"timeout":60}`)
	if a := b.call("process.Process/List", "{}"); a.status != http.StatusBadGateway {
		t.Errorf("list while paused: %d: %s", a.status, a.body)
	}
	c.must(http.StatusCreated, http.MethodPost, b.path("/connect"), `{"timeout":60}`)
	before := b.read("/tmp/far", "").body
	until(t, "the far one goes on", func() bool { now := b.read("/tmp/far", "").body; return now != "" && now != before })
}

func TestNoMoreSandboxesThanThePlanAllows(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{MaxConcurrent: 3})}
	b := c.create(plain)
	c.create(plain)
	c.must(http.StatusBadRequest, http.MethodPost, b.path("/fork"), `{"count":3}`)
	c.must(http.StatusBadRequest, http.MethodPost, b.path("/fork"), `{"count":0}`)
	var forks []struct {
		Sandbox *struct{ SandboxID string }
		Error   *struct {
			Code    int
			Message string
		}
	}
	decode(t, c.must(http.StatusCreated, http.MethodPost, b.path("/fork"), `{"count":2}`).body, &forks)
	// They start together: which of them is one too many is not said.
	if len(forks) == 2 && forks[0].Error != nil {
		slices.Reverse(forks)
	}
	if len(forks) != 2 || forks[0].Sandbox == nil || forks[1].Error == nil || forks[1].Error.Code != 429 {
		t.Errorf("forks %+v", forks)
	}
	a := c.must(http.StatusTooManyRequests, http.MethodPost, "/v2/sandboxes", plain)
	if a.header.Get("Retry-After") != "" || !strings.Contains(a.body, "maximum number of concurrent E2B sandboxes (3)") {
		t.Errorf("%v: %s", a.header, a.body)
	}
	// A paused one makes room, and finds none when it comes back.
	c.must(http.StatusNoContent, http.MethodPost, b.path("/pause"), "")
	c.create(plain)
	c.must(http.StatusTooManyRequests, http.MethodPost, b.path("/connect"), `{"timeout":60}`)
}

func TestASnapshotIsOfOneMomentAndOutlivesItsSandbox(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	b := c.create(plain)
	b.run(`(setsid sh -c 'cd /tmp; i=0; while :; do i=$((i+1)); echo $i > .a && mv .a a && echo $i > .b && mv .b b; done' > /dev/null 2>&1 &)`)
	until(t, "it counts", func() bool { return b.read("/tmp/b", "").status == http.StatusOK })
	var snap struct{ SnapshotID string }
	decode(t, c.must(http.StatusCreated, http.MethodPost, b.path("/snapshots"), `{}`).body, &snap)
	now := b.read("/tmp/b", "").body
	until(t, "it goes on", func() bool { return b.read("/tmp/b", "").body != now })
	c.must(http.StatusNoContent, http.MethodDelete, b.path(""), "")

	first := c.create(fmt.Sprintf(`{"templateID":%q}`, snap.SnapshotID))
	out := first.run(`d=$(($(cat /tmp/a) - $(cat /tmp/b))); echo $d; echo changed > /tmp/a`)
	if out != "0\n" && out != "1\n" {
		t.Errorf("the files are not of one moment: %q", out)
	}
	second := c.create(fmt.Sprintf(`{"templateID":%q}`, snap.SnapshotID))
	if got := second.run("cat /tmp/a"); got == "changed\n" {
		t.Error("a sandbox changed the snapshot that it was made from")
	}
	// The id has a colon, and names have a slash.
	c.must(http.StatusNoContent, http.MethodDelete, "/templates/"+url.PathEscape(snap.SnapshotID), "")
	decode(t, c.must(http.StatusCreated, http.MethodPost, second.path("/snapshots"), `{"name":"mine"}`).body, &snap)
	if got := c.s.Snapshots(); !slices.Equal(got, []string{"team/mine:default"}) {
		t.Errorf("snapshots %v", got)
	}
	c.must(http.StatusNoContent, http.MethodDelete, "/templates/"+url.PathEscape(snap.SnapshotID), "")
	c.must(http.StatusNotFound, http.MethodDelete, "/templates/"+url.PathEscape(snap.SnapshotID), "")
	c.must(http.StatusNotFound, http.MethodDelete, "/templates/base", "")
}
