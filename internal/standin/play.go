package standin

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"net/http"
	"strconv"
	"strings"
)

// cutMark ends a text that max_tokens cut short, so that the stand-in knows
// its own half-said steps again.
const cutMark = " [cut by max_tokens]"

// A part is one variant of a script, ready to be played.
type part struct {
	name  string // as "hello", or "hello#2" when the script has several variants
	steps []Step
}

func parts(name string, s Script) []part {
	variants := s.variants()
	ps := make([]part, len(variants))
	for i, steps := range variants {
		ps[i] = part{name: name, steps: steps}
		if len(variants) > 1 {
			ps[i].name = name + "#" + strconv.Itoa(i+1)
		}
	}
	return ps
}

// toolID is a function of what is called and where: a step that is said twice
// calls by the same id.
func (p part) toolID(step, i int) string {
	h := sha256.New()
	t := p.steps[step].Tools[i]
	fmt.Fprintf(h, "%s\n%d\n%d\n%s\n", p.name, step, i, t.Name)
	input := t.input()
	var v any
	if json.Unmarshal(input, &v) == nil {
		if b, err := json.Marshal(v); err == nil { // one id, however the object was spelt
			input = b
		}
	}
	h.Write(input)
	return "toolu_" + hex.EncodeToString(h.Sum(nil)[:12])
}

// said reports whether m is the step's message.
func (p part) said(step int, m message) bool {
	s := p.steps[step]
	var texts []string
	for _, b := range m.blocks {
		if b.Type == "text" {
			texts = append(texts, b.Text)
		}
		for i := range s.Tools {
			if b.Type == "tool_use" && b.ID == p.toolID(step, i) {
				return true
			}
		}
	}
	text := strings.TrimSpace(strings.Join(texts, ""))
	if begin, cut := strings.CutSuffix(text, strings.TrimSpace(cutMark)); cut {
		return strings.HasPrefix(s.Text, strings.TrimSpace(begin))
	}
	return len(s.Tools) == 0 && text != "" && text == strings.TrimSpace(s.Text)
}

// next returns which step comes after the messages, and how many of them
// belong to the part.
func (p part) next(after []message) (step, matched int) {
	for _, m := range after {
		if m.Role != "assistant" {
			continue
		}
		// A client may have dropped a message, so later steps are known too.
		for i := step; i < len(p.steps); i++ {
			if p.said(i, m) {
				step, matched = i+1, matched+1
				break
			}
		}
	}
	return step, matched
}

// A turn is what a call is answered with.
type turn struct {
	part  part
	index int // of the step; len(part.steps): the script is over
	step  Step
	try   int // earlier calls of the conversation for the same step
}

// find returns the turn that a call has come to; its error is the client's
// fault and is sent with the status.
func (s *Server) find(c *call) (turn, int, error) {
	name, variant, after, ok := c.named()
	if !ok {
		if s.opts.Default == "" {
			return turn{}, http.StatusBadRequest, fmt.Errorf("no text of the user names a script: write @script NAME")
		}
		name = s.opts.Default
	}
	script, ok := s.opts.Scripts[name]
	if !ok {
		return turn{}, http.StatusNotFound, fmt.Errorf("no script %q", name)
	}
	if err := s.wrong[name]; err != nil {
		return turn{}, http.StatusBadRequest, err
	}
	ps := parts(name, script)
	v, err := s.variant(c, name, script, variant, ps, after)
	if err != nil {
		return turn{}, http.StatusNotFound, err
	}
	t := turn{part: ps[v]}
	t.index, _ = t.part.next(after)
	if t.index < len(t.part.steps) {
		t.step = t.part.steps[t.index]
	} else {
		t.step = Step{Text: t.part.steps[len(t.part.steps)-1].Text}
	}
	t.try = s.counted(fmt.Sprintf("%s\n%s\n%d", c.conversation(), t.part.name, t.index))
	return t, 0, nil
}

// variant chooses the part that a conversation hears; see the package comment.
func (s *Server) variant(c *call, name string, script Script, asked string, ps []part, after []message) (int, error) {
	if asked != "" {
		n, err := strconv.Atoi(asked)
		if err != nil || n < 1 || n > len(ps) {
			return 0, fmt.Errorf("script %q has no variant %s", name, asked)
		}
		return n - 1, nil
	}
	if n, ok := script.Sessions[c.session]; ok && c.session != "" {
		return n - 1, nil
	}
	if len(ps) == 1 {
		return 0, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := c.conversation() + "\n" + name
	remembered, known := s.chosen[key]
	best, most, tied := 0, 0, true
	for i, p := range ps {
		switch _, matched := p.next(after); {
		case matched > most:
			best, most, tied = i, matched, false
		case matched == most:
			tied = true
		}
	}
	if !tied {
		s.choose(key, name, best)
		return best, nil
	}
	if known {
		return remembered, nil
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(c.conversation()))
	first := int(h.Sum32() % uint32(len(ps)))
	best = first
	for i := range ps {
		if v := (first + i) % len(ps); s.uses[use(name, v)] < s.uses[use(name, best)] {
			best = v
		}
	}
	s.choose(key, name, best)
	return best, nil
}

func (s *Server) choose(key, name string, v int) {
	if _, known := s.chosen[key]; !known {
		if len(s.chosen) >= maxSessions {
			clear(s.chosen)
		}
		s.uses[use(name, v)]++
	}
	s.chosen[key] = v
}

func use(name string, v int) string { return name + "#" + strconv.Itoa(v+1) }

// counted returns how often it was called with key before.
func (s *Server) counted(key string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.tries) >= 16*maxSessions {
		clear(s.tries)
	}
	n := s.tries[key]
	s.tries[key] = n + 1
	return n
}

// conversation names the conversation that the call belongs to: the client's
// session, or else the first thing that its user said.
func (c *call) conversation() string {
	if c.session != "" {
		return c.session
	}
	for _, m := range c.Messages {
		if m.Role == "user" && len(m.blocks) > 0 {
			sum := sha256.Sum256(m.blocks[0].raw)
			return hex.EncodeToString(sum[:8])
		}
	}
	return ""
}
