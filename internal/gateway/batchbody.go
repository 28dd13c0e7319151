package gateway

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// The bounds of one message batch. The API takes so many requests; the models
// are bounded because each of them is a row of the ledger.
const (
	maxBatch       = 100_000
	maxBatchModels = 64
)

// A batched is one request of a message batch.
type batched struct {
	*request
	id string // the agent's own name for it
}

// readBatch finds everything in the body of a new batch that its price depends
// on. The error says what is wrong with the body, for the agent to read. A
// member that is not known could be one that costs money, so there may be none.
func readBatch(body []byte) ([]batched, error) {
	if !utf8.Valid(body) {
		return nil, errJSON
	}
	s := scanner{b: body, out: new(request)}
	var all []batched
	ids := map[string]bool{}
	err := s.members(func(name string) error {
		if name != "requests" {
			return fmt.Errorf("the batch has %.40q, which the gateway does not know", name)
		}
		return s.elements(func() error {
			if len(all) == maxBatch {
				return fmt.Errorf("the batch has more than %d requests", maxBatch)
			}
			b, err := s.batched()
			switch {
			case err != nil:
				return fmt.Errorf("request %d: %w", len(all)+1, err)
			case ids[b.id]:
				return fmt.Errorf("request %d: the custom_id %q was there before", len(all)+1, b.id)
			}
			ids[b.id] = true
			all = append(all, b)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	if s.space(); s.i != len(s.b) {
		return nil, errJSON
	}
	if len(all) == 0 {
		return nil, errors.New("the batch has no requests")
	}
	return all, nil
}

// batched takes one element of "requests".
func (s *scanner) batched() (b batched, err error) {
	err = s.members(func(name string) error {
		switch name {
		case "custom_id":
			raw, err := s.str()
			if err != nil {
				return errors.New("its custom_id is no string")
			}
			if b.id, err = unquote(raw); err != nil {
				return err
			}
			if len(b.id) > 64 || !plainWord(b.id) {
				return errors.New("its custom_id is not 1 to 64 letters, digits, dashes and underscores")
			}
			return nil
		case "params":
			if s.i >= len(s.b) || s.b[s.i] != '{' {
				return errors.New("its params are no object")
			}
			b.request = new(request)
			start := s.i
			s.out = b.request
			err := s.value(atTop, nil)
			b.body = s.i - start
			b.read()
			return err
		}
		return fmt.Errorf("it has %.40q, which the gateway does not know", name)
	})
	switch {
	case err != nil:
		return b, err
	case b.id == "":
		return b, errors.New("it has no custom_id")
	case b.request == nil:
		return b, errors.New("it has no params")
	case b.maxTokens < 1:
		return b, errors.New("it has no max_tokens")
	}
	return b, nil
}

// plainWord reports whether a text is of letters, digits, dashes and underscores.
func plainWord(s string) bool {
	return s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") == ""
}

// batchID reports whether a text can be the API's name of a batch, and can stand
// in a path.
func batchID(id string) bool { return len(id) <= 128 && plainWord(id) }

// members takes an object, and calls f at the value of each of its members. Which
// of two equal keys counts is up to the reader, so there may be none.
func (s *scanner) members(f func(name string) error) error {
	s.space()
	if s.i >= len(s.b) || s.b[s.i] != '{' {
		return errJSON
	}
	var keys frame
	return s.list('}', func() error {
		key, err := s.str()
		if err != nil {
			return err
		}
		name, err := unquote(key)
		if err != nil {
			return err
		}
		if keys.twice(name) {
			return fmt.Errorf("the body has %.40q twice", name)
		}
		s.space()
		if s.i >= len(s.b) || s.b[s.i] != ':' {
			return errJSON
		}
		s.i++
		s.space()
		return f(name)
	})
}

// elements takes an array, and calls f at each of its elements.
func (s *scanner) elements(f func() error) error {
	s.space()
	if s.i >= len(s.b) || s.b[s.i] != '[' {
		return errJSON
	}
	return s.list(']', f)
}

// list takes what stands between s and the end, with commas in between.
func (s *scanner) list(end byte, f func() error) error {
	s.i++ // { or [
	for first := true; ; first = false {
		s.space()
		if s.i < len(s.b) && s.b[s.i] == end && first {
			break
		}
		if err := f(); err != nil {
			return err
		}
		s.space()
		if s.i >= len(s.b) {
			return errJSON
		}
		if s.b[s.i] == end {
			break
		}
		if s.b[s.i] != ',' {
			return errJSON
		}
		s.i++
	}
	s.i++
	return nil
}

// parts says what the batch can cost at most, model by model: that of each of its
// requests with all the output that the gateway lets it have, since nobody could
// make a whole of half an answer when the batch has ended. What the API's tools
// cost is the same in a batch.
func (p *Prices) parts(all []batched, maxOutput int64) []ledger.Part {
	var list []ledger.Part
	place := map[string]int{}
	for _, q := range all {
		want := q.want(maxOutput)
		for _, s := range p.shares(q.request, -1) {
			i, ok := place[p.key(s.model)]
			if !ok {
				i = len(list)
				place[p.key(s.model)] = i
				list = append(list, ledger.Part{Model: shorten(s.model)})
			}
			most := p.batch.of(plus(s.prompt, times(want, s.perToken)))
			list[i].Most = plus(list[i].Most, plus(most, s.tools))
		}
	}
	return list
}

// key is the same for all names of one model.
func (p *Prices) key(model string) string {
	if id, ok := p.Resolve(model); ok {
		return id
	}
	return shorten(model)
}

// clampBatch is clamp for a batch.
func clampBatch(body []byte, all []batched, maxOutput int64) []byte {
	var out []byte
	done := 0
	for _, q := range all {
		if n := q.want(maxOutput); n < q.maxTokens {
			out = append(out, body[done:q.maxAt]...)
			out = strconv.AppendInt(out, n, 10)
			done = q.maxEnd
		}
	}
	if done == 0 {
		return body
	}
	return append(out, body[done:]...)
}
