package standin

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"io"
	"slices"
	"sync"
	"time"
)

// The rules of the prompt cache, from Anthropic's documentation of prompt
// caching: an entry is a prefix of tools, system and messages that ended in a
// block with cache_control; a call finds the longest entry that ends at one of
// 20 places, of which one of its own marks is the first and the others are the
// blocks before; reading an entry renews it;
// prefixes of less than 1024 tokens are not kept.
const (
	lookBack      = 20
	leastCached   = 1024 // tokens
	mostMarks     = 4
	bytesPerToken = 4
)

// A piece is a block of the prompt, as the cache sees it.
type piece struct {
	prefix [sha256.Size]byte // hash of everything up to the block's end
	bytes  int               // of everything up to the block's end
	ttl    time.Duration     // of the entry that ends here; 0: no mark
}

type cache struct {
	mu      sync.Mutex
	entries map[string]entry
}

type entry struct {
	ttl     time.Duration
	expires time.Time
}

// blocks returns the call's pieces and the number of its bytes.
func (c *call) blocks() ([]piece, int) {
	var pieces []piece
	var at piece
	add := func(place string, raw json.RawMessage) {
		body, ttl := canonical(raw)
		h := sha256.New()
		h.Write(at.prefix[:])
		_, _ = io.WriteString(h, place)
		h.Write(body)
		at = piece{prefix: [sha256.Size]byte(h.Sum(nil)), bytes: at.bytes + len(body), ttl: ttl}
		pieces = append(pieces, at)
	}
	for _, t := range c.Tools {
		add("tools ", t)
	}
	for _, b := range c.system {
		add("system ", b.raw)
	}
	for _, m := range c.Messages {
		for _, b := range m.blocks {
			add(m.Role+" ", b.raw)
		}
	}
	return pieces, at.bytes
}

// canonical returns raw with its keys in order and without cache_control,
// which is no part of what is cached, and the time to live that it asked for.
func canonical(raw json.RawMessage) ([]byte, time.Duration) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	var v map[string]any
	if err := dec.Decode(&v); err != nil {
		return raw, 0
	}
	var ttl time.Duration
	if control, ok := v["cache_control"].(map[string]any); ok {
		ttl = 5 * time.Minute
		if control["ttl"] == "1h" {
			ttl = time.Hour
		}
	}
	delete(v, "cache_control")
	body, err := json.Marshal(v)
	if err != nil {
		return raw, ttl
	}
	return body, ttl
}

// charge returns what the input of a call costs when its answer begins at now,
// and keeps in the cache what the call asks for. Callers of different keys or
// models do not share entries.
func (c *cache) charge(owner string, pieces []piece, total int, now time.Time) Usage {
	c.mu.Lock()
	defer c.mu.Unlock()
	name := func(p piece) string { return owner + "\x00" + string(p.prefix[:]) }

	var marks []int
	for i, p := range pieces {
		if p.ttl > 0 && p.bytes/bytesPerToken >= leastCached {
			marks = append(marks, i)
		}
	}
	if len(marks) > mostMarks {
		marks = marks[len(marks)-mostMarks:]
	}

	hit := -1
	for _, m := range slices.Backward(marks) {
		for i := m; i >= 0 && i > m-lookBack && i > hit; i-- {
			if e, ok := c.entries[name(pieces[i])]; ok && now.Before(e.expires) {
				hit = i
			}
		}
	}
	u := Usage{}
	read := 0
	if hit >= 0 {
		read = pieces[hit].bytes / bytesPerToken
		u.CacheRead = read
		e := c.entries[name(pieces[hit])]
		c.entries[name(pieces[hit])] = entry{ttl: e.ttl, expires: now.Add(e.ttl)}
	}
	done := read
	for _, m := range marks {
		c.entries[name(pieces[m])] = c.renewed(name(pieces[m]), pieces[m].ttl, now)
		upTo := pieces[m].bytes / bytesPerToken
		if upTo <= done {
			continue
		}
		if pieces[m].ttl == time.Hour {
			u.Creation.OneHour += upTo - done
		} else {
			u.Creation.FiveMinutes += upTo - done
		}
		done = upTo
	}
	u.CacheWrite = u.Creation.OneHour + u.Creation.FiveMinutes
	u.Input = total/bytesPerToken - done
	c.sweep(now)
	return u
}

// renewed is the entry that ends at a mark from now on: a mark never shortens
// the life of an entry that is there already.
func (c *cache) renewed(name string, ttl time.Duration, now time.Time) entry {
	if e, ok := c.entries[name]; ok && now.Before(e.expires) && e.ttl > ttl {
		ttl = e.ttl
	}
	return entry{ttl: ttl, expires: now.Add(ttl)}
}

// sweep forgets what expired, once the cache has grown large.
func (c *cache) sweep(now time.Time) {
	if len(c.entries) < 1<<16 {
		return
	}
	for name, e := range c.entries {
		if !now.Before(e.expires) {
			delete(c.entries, name)
		}
	}
	if len(c.entries) >= 1<<16 {
		clear(c.entries)
	}
}
