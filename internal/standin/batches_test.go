package standin_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// A batchServer is a stand-in with a clock, and one client.
type batchServer struct {
	*standin.Server
	t   *testing.T
	now time.Time
}

func newBatchServer(t *testing.T, scripts string) *batchServer {
	all, err := standin.ParseScripts(strings.NewReader(scripts))
	if err != nil {
		t.Fatal(err)
	}
	s := &batchServer{t: t, now: time.Date(2026, 11, 29, 10, 0, 0, 0, time.UTC)}
	s.Server = standin.New(standin.Options{Scripts: all, Now: func() time.Time { return s.now }})
	t.Cleanup(s.Close)
	return s
}

func (s *batchServer) do(method, path, body string) (status int, answer string) {
	s.t.Helper()
	req := httptest.NewRequestWithContext(s.t.Context(), method, "/v1/messages/batches"+path, strings.NewReader(body))
	req.Header.Set("X-Api-Key", "k")
	w := httptest.NewRecorder()
	s.ServeHTTP(w, req)
	return w.Code, w.Body.String()
}

type batchBody struct {
	ID      string         `json:"id"`
	Status  string         `json:"processing_status"`
	Counts  map[string]int `json:"request_counts"`
	Results *string        `json:"results_url"`
}

func (s *batchServer) batch(method, path, body string) (b batchBody) {
	s.t.Helper()
	status, text := s.do(method, path, body)
	if err := json.Unmarshal([]byte(text), &b); err != nil || status != http.StatusOK {
		s.t.Fatalf("%s %s: %d %s", method, path, status, text)
	}
	return b
}

const threeScripts = `{"now": {"steps": [{"text": "Done.", "output_tokens": 9}]}, "late": {"steps": [{"text": "Late.", "delay": "1h"}]},
	"bad": {"steps": [{"text": "x", "faults": [{"kind": "status", "status": 500}]}]}}`

func requestsOf(scripts ...string) string {
	var list []string
	for _, name := range scripts {
		list = append(list, `{"custom_id":"`+name+`","params":{"model":"claude-sonnet-5-5","max_tokens":100,"messages":[{"role":"user","content":"@script `+name+`"}]}}`)
	}
	return `{"requests":[` + strings.Join(list, ",") + `]}`
}

func TestABatchEndsWithTheLastOfItsRequests(t *testing.T) {
	s := newBatchServer(t, threeScripts)
	b := s.batch("POST", "", requestsOf("now", "late", "bad", "unknown"))
	if b.Status != "in_progress" || b.Results != nil || b.Counts["processing"] != 4 {
		t.Errorf("%+v", b)
	}
	s.now = s.now.Add(59 * time.Minute)
	if b := s.batch("GET", "/"+b.ID, ""); b.Status != "in_progress" || len(s.Requests()) != 2 {
		t.Errorf("%+v, %d requests", b, len(s.Requests()))
	}
	if status, _ := s.do("GET", "/"+b.ID+"/results", ""); status != 404 {
		t.Errorf("results of a batch that goes on: %d", status)
	}
	s.now = s.now.Add(time.Minute)
	for range 2 { // it is played once
		b = s.batch("GET", "/"+b.ID, "")
		if diff := cmp.Diff(map[string]int{"processing": 0, "succeeded": 2, "errored": 2, "canceled": 0, "expired": 0}, b.Counts); diff != "" || b.Status != "ended" || b.Results == nil {
			t.Errorf("%+v %s", b, diff)
		}
	}
	_, text := s.do("GET", "/"+b.ID+"/results", "")
	types := map[string]string{}
	tokens := 0
	for line := range strings.Lines(text) {
		var r struct {
			ID     string `json:"custom_id"`
			Result struct {
				Type    string
				Message struct{ Usage standin.Usage }
			}
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err, line)
		}
		types[r.ID] = r.Result.Type
		tokens += r.Result.Message.Usage.Output
	}
	if diff := cmp.Diff(map[string]string{"now": "succeeded", "late": "succeeded", "bad": "errored", "unknown": "errored"}, types); diff != "" {
		t.Error(diff)
	}
	charged := 0
	for _, r := range s.Requests() {
		charged += r.Usage.Output
		if r.Usage.Output > 0 && r.Usage.Tier != "batch" {
			t.Errorf("%+v", r)
		}
	}
	if charged != tokens || tokens < 10 {
		t.Errorf("%d tokens are told, %d charged", tokens, charged)
	}
	if status, _ := s.do("DELETE", "/"+b.ID, ""); status != 200 {
		t.Error(status)
	}
	if status, _ := s.do("GET", "/"+b.ID, ""); status != 404 {
		t.Error(status)
	}
}

func TestWhatABatchHadNoTimeForIsNotCharged(t *testing.T) {
	s := newBatchServer(t, threeScripts)
	b := s.batch("POST", "", requestsOf("now", "late"))
	if b := s.batch("POST", "/"+b.ID+"/cancel", ""); b.Status != "ended" || b.Counts["succeeded"] != 1 || b.Counts["canceled"] != 1 {
		t.Errorf("%+v", b)
	}
	charged := 0
	for _, r := range s.Requests() {
		charged += r.Usage.Output
	}
	if charged != 9 {
		t.Errorf("%d tokens are charged", charged)
	}
}

func TestWhatIsNearlyDoneIsNotInterrupted(t *testing.T) {
	s := newBatchServer(t, threeScripts)
	b := s.batch("POST", "", requestsOf("now", "late"))
	s.now = s.now.Add(time.Hour - 5*time.Second)
	if b := s.batch("POST", "/"+b.ID+"/cancel", ""); b.Status != "canceling" || b.Counts["processing"] != 2 {
		t.Errorf("%+v", b)
	}
	s.now = s.now.Add(5 * time.Second)
	if b := s.batch("GET", "/"+b.ID, ""); b.Status != "ended" || b.Counts["succeeded"] != 2 {
		t.Errorf("%+v", b)
	}
}

func TestBatchesBelongToTheirKey(t *testing.T) {
	s := newBatchServer(t, threeScripts)
	b := s.batch("POST", "", requestsOf("now"))
	req := httptest.NewRequestWithContext(t.Context(), "GET", "/v1/messages/batches/"+b.ID, nil)
	req.Header.Set("X-Api-Key", "other")
	w := httptest.NewRecorder()
	s.ServeHTTP(w, req)
	if w.Code != 404 {
		t.Error(w.Code)
	}
	if _, text := s.do("GET", "", ""); !strings.Contains(text, b.ID) {
		t.Errorf("%s", text)
	}
	for _, body := range []string{`{}`, `{"requests":[]}`, `[]`, requestsOf("now", "now")} {
		if status, _ := s.do("POST", "", body); status != 400 {
			t.Errorf("%s: %d", body, status)
		}
	}
}
