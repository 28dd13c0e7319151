package e2btest

import (
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"
)

func (s *Server) postSnapshot(w http.ResponseWriter, r *http.Request, v *vm) {
	var body struct {
		Name string `json:"name"`
	}
	if !read(w, r, &body) {
		return
	}
	n := &snapshot{id: randomID("snp", 8) + ":default", name: body.Name, from: v.id, created: time.Now()}
	if n.name != "" {
		n.id = "team/" + n.name + ":default"
	}
	n.dir = s.snapshotDir()
	if err := v.save(n.dir); err != nil {
		remove(n.dir)
		refuse(w, v, err)
		return
	}
	s.mu.Lock()
	old := s.snapshots[n.id]
	s.snapshots[n.id] = n
	s.mu.Unlock()
	if old != nil {
		remove(old.dir)
	}
	answer(w, http.StatusCreated, n.listed())
}

func (n *snapshot) listed() map[string]any {
	names := []string{}
	if n.name != "" {
		names = append(names, n.id)
	}
	return map[string]any{"snapshotID": n.id, "names": names}
}

func (s *Server) listSnapshots(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	s.mu.Lock()
	var all []*snapshot
	for _, n := range s.sortedSnapshots() {
		if from := q.Get("sandboxID"); from != "" && n.from != from {
			continue
		}
		if name := q.Get("name"); name != "" && n.name != name && n.id != name {
			continue
		}
		all = append(all, n)
	}
	s.mu.Unlock()
	page, ok := paged(w, q, all, false, func(n *snapshot) string { return place(n.created, n.id) })
	if !ok {
		return
	}
	out := []map[string]any{}
	for _, n := range page {
		out = append(out, n.listed())
	}
	answer(w, http.StatusOK, out)
}

// deleteTemplate removes a snapshot. Templates are not ours to remove.
func (s *Server) deleteTemplate(w http.ResponseWriter, id string) {
	s.mu.Lock()
	n := s.snapshots[id]
	if n == nil {
		n = s.snapshots[id+":default"]
	}
	if n != nil {
		delete(s.snapshots, n.id)
	}
	s.mu.Unlock()
	if n == nil {
		fail(w, http.StatusNotFound, fmt.Sprintf("template '%s' not found", id))
		return
	}
	remove(n.dir)
	w.WriteHeader(http.StatusNoContent)
}

// forkSandbox makes sandboxes with the files of one, and its metadata. Their
// processes are not among what they share with it: nothing here can copy
// those.
func (s *Server) forkSandbox(w http.ResponseWriter, r *http.Request, v *vm) {
	var body struct {
		Timeout *int `json:"timeout"`
		Count   *int `json:"count"`
	}
	if !read(w, r, &body) {
		return
	}
	count := 1
	if body.Count != nil {
		count = *body.Count
	}
	if most := s.opts.MaxConcurrent; count < 1 || count > 100 || most > 0 && count >= most {
		fail(w, http.StatusBadRequest, fmt.Sprintf("count %d is out of range", count))
		return
	}
	life, ok := s.seconds(w, body.Timeout, 15)
	if !ok {
		return
	}
	dir := s.snapshotDir()
	defer remove(dir)
	if err := v.save(dir); err != nil {
		refuse(w, v, err)
		return
	}
	out := make([]map[string]any, count)
	var all sync.WaitGroup
	turns := make(chan struct{}, 4) // what they wait for is the disk
	for i := range out {
		all.Go(func() {
			turns <- struct{}{}
			out[i] = s.forked(w, v, i, dir, life)
			<-turns
		})
	}
	all.Wait()
	answer(w, http.StatusCreated, out)
}

func (s *Server) forked(w http.ResponseWriter, v *vm, i int, dir string, life time.Duration) map[string]any {
	failed := func(status int, message string) map[string]any {
		return map[string]any{"error": map[string]any{"code": status, "message": message}}
	}
	if status := forkFault(w, i); status != 0 {
		return failed(status, http.StatusText(status))
	}
	fork, err := s.create(v.spec, dir, life)
	switch {
	case errors.Is(err, errTooMany):
		return failed(http.StatusTooManyRequests, full(s.opts.MaxConcurrent))
	case err != nil:
		return failed(http.StatusInternalServerError, err.Error())
	}
	return map[string]any{"sandbox": s.made(fork)}
}
