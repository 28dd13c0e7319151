package gateway

import (
	"encoding/binary"
	"hash/maphash"
	"slices"
	"sort"
	"sync"
)

// How long a prompt is, in tokens, is known only from the answer. What can be
// said before is that no token stands for less than a byte; but agents' requests
// have four bytes to a token, and a budget that is reserved by the byte is soon
// held up. So each prompt is compared with those that were answered lately: an
// agent sends the whole conversation every time, and the part that is the same
// has at most as many tokens as the whole prompt had that it was a part of.
//
// What is compared are members of the body: their values are the same, or begin
// the same in the case of messages. An agent must not be able to have something
// counted once, cheaply, and billed another time; so no use is made of a body
// whose reading is in doubt, or in which something stands that the API counts in
// its own way (pictures, documents, results of server tools) or cuts out (what a
// context edit removes). What it leaves out of some prompts and not of others,
// the model's own thoughts and tools that are loaded when they are asked for, is
// always reserved by the byte.
//
// The comparison is one of hashes. They are keyed: nobody can write a body that
// is taken for another.

const (
	// blockSize is how fine messages are compared, in bytes.
	blockSize = 2048

	// edges are the tokens that the cuts between a shared part and the rest can
	// add: a token that is cut in two becomes at most as many as it has bytes.
	edges = 256

	// keptPrompts is how many prompts are remembered of a fork, and of a run.
	keptPrompts = 6

	// keptRuns is how many runs' prompts are remembered.
	keptRuns = 128
)

// marks are what a body is compared by.
type marks struct {
	members  map[string]mark // but messages
	messages []uint64        // the hash of the first 1, 2, 3, … blocks
}

type mark struct {
	sum  uint64
	size int
}

// A knownPrompt is one that was answered.
type knownPrompt struct {
	*marks
	model  string
	tokens int64
}

// prompts remembers what was answered lately.
type prompts struct {
	seed maphash.Seed

	mu    sync.Mutex
	forks map[tenantKey][]knownPrompt
	runs  map[string][]knownPrompt // the first ones of its forks: others begin alike
	order []string                 // of runs, oldest first
}

func newPrompts() *prompts {
	return &prompts{seed: maphash.MakeSeed(), forks: map[tenantKey][]knownPrompt{}, runs: map[string][]knownPrompt{}}
}

// mark hashes a body.
func (p *prompts) mark(body []byte, q *request) *marks {
	m := &marks{members: map[string]mark{}}
	for _, s := range q.members {
		value := body[s.start:s.end]
		if s.key != "messages" {
			m.members[s.key] = mark{maphash.Bytes(p.seed, value), len(value)}
			continue
		}
		var sum [16]byte // of what came before and of the next block
		for ; len(value) >= blockSize; value = value[blockSize:] {
			binary.LittleEndian.PutUint64(sum[8:], maphash.Bytes(p.seed, value[:blockSize]))
			binary.LittleEndian.PutUint64(sum[:8], maphash.Bytes(p.seed, sum[:]))
			m.messages = append(m.messages, binary.LittleEndian.Uint64(sum[:8]))
		}
	}
	return m
}

// shared returns how many bytes the two bodies have in common.
func (m *marks) shared(o *marks) (n int) {
	for key, v := range m.members {
		if o.members[key] == v {
			n += v.size
		}
	}
	most := min(len(m.messages), len(o.messages))
	return n + blockSize*sort.Search(most, func(i int) bool { return m.messages[i] != o.messages[i] })
}

// bound returns the most tokens that a prompt for model can have, going by what
// is known, and false when nothing is.
func (p *prompts) bound(key tenantKey, q *request, m *marks) (most int64, ok bool) {
	if q.unsure {
		return 0, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range slices.Concat(p.forks[key], p.runs[key.run]) {
		if k.model != q.model {
			continue // another model may count otherwise
		}
		n := k.tokens + int64(q.body-m.shared(k.marks)+q.apart) + edges
		if !ok || n < most {
			most, ok = n, true
		}
	}
	return most, ok
}

// learn remembers how long a prompt was.
func (p *prompts) learn(key tenantKey, q *request, m *marks, tokens int64) {
	if tokens <= 0 || q.unsure {
		return
	}
	k := knownPrompt{marks: m, model: q.model, tokens: tokens}
	p.mu.Lock()
	defer p.mu.Unlock()
	first := len(p.forks[key]) == 0
	p.forks[key] = keepLast(p.forks[key], k)
	if !first {
		return
	}
	if p.runs[key.run] == nil {
		if p.order = append(p.order, key.run); len(p.order) > keptRuns {
			delete(p.runs, p.order[0])
			p.order = slices.Delete(p.order, 0, 1)
		}
	}
	p.runs[key.run] = keepLast(p.runs[key.run], k)
}

func keepLast(list []knownPrompt, k knownPrompt) []knownPrompt {
	if len(list) >= keptPrompts {
		list = slices.Delete(list, 0, len(list)-keptPrompts+1)
	}
	return append(list, k)
}

// forget drops what is known of a fork that has ended.
func (p *prompts) forget(key tenantKey) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.forks, key)
}
