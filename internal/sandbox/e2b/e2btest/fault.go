package e2btest

import (
	"fmt"
	"net/http"
	"path"
	"strconv"
	"time"
)

// A Fault is something that goes wrong with certain requests. The zero
// values of what happens do nothing, and several can be given: Do and Delay
// come first, then Status or Fork, then what is done to the answer.
type Fault struct {
	// On says which requests, as "METHOD /path" with the * of path.Match;
	// empty: all. The path is that of the URL, without the sandbox and the
	// port that some clients put there.
	On      string
	Sandbox string // only those to the data plane of this sandbox
	Skip    int    // let so many pass first
	Times   int    // how often it happens; 0: once, less: for ever

	Do    func(sandbox string) // called before the request is carried out
	Delay time.Duration        // before it is

	Status int         // answered instead of carrying the request out
	Header http.Header // of that answer
	Body   string      // of that answer; empty: the JSON of E2B's errors

	// Fork maps the number of a fork, from 0, to the status that it fails
	// with while its siblings succeed.
	Fork map[int]int

	Lose           bool  // the request is carried out, the connection is cut instead of an answer
	CutAfter       int64 // the connection is cut after so many bytes of the answer's body
	BytesPerSecond int64 // how fast the body of the answer comes
}

// planned is a fault that waits for its requests.
type planned struct {
	Fault
	skip, left int
}

// Fault plans what goes wrong, until it has happened as often as it may or
// forget is called. Of several that match a request, the one planned first
// happens.
func (s *Server) Fault(f Fault) (forget func()) {
	p := &planned{Fault: f, skip: f.Skip, left: f.Times}
	if f.Times == 0 {
		p.left = 1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, p)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		p.left = 0
	}
}

// RateLimited is the 429 of those who ask too often.
func RateLimited(on string, after time.Duration) Fault {
	seconds := strconv.Itoa(int((after + time.Second - 1) / time.Second))
	return Fault{On: on, Status: http.StatusTooManyRequests, Body: `{"code":429,"message":"Rate limit exceeded"}`, Header: http.Header{
		"Retry-After": {seconds}, "Ratelimit-Limit": {"1"}, "Ratelimit-Remaining": {"0"}, "Ratelimit-Reset": {seconds},
	}}
}

// Full is the 429 of those who run as many sandboxes as they may.
func Full(on string, most int) Fault {
	return Fault{On: on, Status: http.StatusTooManyRequests, Body: fmt.Sprintf(`{"code":429,"message":%q}`, full(most))}
}

// NotRunning is what E2B's proxy says when it does not find the sandbox,
// which may well run.
func NotRunning(on, sandbox string) Fault {
	return Fault{On: on, Sandbox: sandbox, Status: http.StatusBadGateway, Body: fmt.Sprintf(`{"sandboxId":%q,"message":"The sandbox was not found","code":502}`, sandbox)}
}

// Unauthorized is what a sandbox says to who has another one's token: no
// answer of the protocol that was spoken.
func Unauthorized(on string) Fault {
	return Fault{On: on, Status: http.StatusUnauthorized, Body: unauthorized}
}

// strike finds the fault that happens to a request and has it happen. It
// returns what the answer is to be written to; not ok: there is none to give
// any more.
func (s *Server) strike(w http.ResponseWriter, r *http.Request, sandbox string) (http.ResponseWriter, bool) {
	f := s.next(r, sandbox)
	if f == nil {
		return w, true
	}
	if f.Do != nil {
		f.Do(sandbox)
	}
	if f.Delay > 0 {
		select {
		case <-time.After(f.Delay):
		case <-r.Context().Done():
			return w, false
		}
	}
	if f.Status != 0 {
		body := f.Body
		if body == "" {
			body = fmt.Sprintf(`{"code":%d,"message":%q}`, f.Status, http.StatusText(f.Status))
		}
		w.Header().Set("Content-Type", "application/json")
		for k, v := range f.Header {
			w.Header()[http.CanonicalHeaderKey(k)] = v
		}
		w.WriteHeader(f.Status)
		_, _ = w.Write([]byte(body))
		return w, false
	}
	return &struck{ResponseWriter: w, fault: f}, true
}

func (s *Server) next(r *http.Request, sandbox string) *planned {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.faults {
		if p.left == 0 || p.Sandbox != "" && p.Sandbox != sandbox {
			continue
		}
		if p.On != "" {
			if ok, err := path.Match(p.On, r.Method+" "+r.URL.Path); err != nil || !ok {
				continue
			}
		}
		if p.skip > 0 {
			p.skip--
			continue
		}
		if p.left > 0 {
			p.left--
		}
		return p
	}
	return nil
}

// struck is an answer that something happens to.
type struck struct {
	http.ResponseWriter
	fault *planned

	written int64
}

// Unwrap is for http.ResponseController.
func (s *struck) Unwrap() http.ResponseWriter { return s.ResponseWriter }

func (s *struck) WriteHeader(status int) {
	if s.fault.Lose {
		panic(http.ErrAbortHandler)
	}
	s.ResponseWriter.WriteHeader(status)
}

func (s *struck) Write(b []byte) (int, error) {
	if s.fault.Lose {
		panic(http.ErrAbortHandler)
	}
	total := 0
	for len(b) > 0 {
		n := len(b)
		if cut := s.fault.CutAfter; cut > 0 {
			left := cut - s.written
			if left <= 0 {
				// What was written before is to arrive.
				_ = http.NewResponseController(s.ResponseWriter).Flush()
				panic(http.ErrAbortHandler)
			}
			n = min(n, int(left))
		}
		if pace := s.fault.BytesPerSecond; pace > 0 {
			n = min(n, int(max(pace/20, 1)))
			time.Sleep(time.Duration(n) * time.Second / time.Duration(pace))
		}
		m, err := s.ResponseWriter.Write(b[:n])
		s.written += int64(m)
		total += m
		if err == nil && s.fault.BytesPerSecond > 0 {
			err = http.NewResponseController(s.ResponseWriter).Flush()
		}
		if err != nil {
			return total, err
		}
		b = b[n:]
	}
	return total, nil
}

// lose cuts the connection when an answer is to be lost, also one that has
// nothing to say.
func lose(w http.ResponseWriter) {
	if s, ok := w.(*struck); ok && s.fault.Lose {
		panic(http.ErrAbortHandler)
	}
}

// forkFault is the status that the fork with a number fails with, or 0.
func forkFault(w http.ResponseWriter, n int) int {
	if s, ok := w.(*struck); ok {
		return s.fault.Fork[n]
	}
	return 0
}
