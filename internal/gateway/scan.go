package gateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
)

// errJSON is a body that is not one JSON object.
var errJSON = errors.New("the body is not one JSON object")

// A place is where in a request the scanner stands. Only the places that cost
// money have a name; everything else is elsewhere.
type place int

const (
	atElsewhere place = iota
	atTop
	atModel
	atMaxTokens
	atStreaming
	atSpeed
	atGeography
	atThinking
	atThinkingBudget
	atFallbacks
	atFallback
	atFallbackModel
	atMcpServers
	atMcpServer
	atManagement
	atEdits
	atEdit
	atEditType
	atTools
	atTool
	atToolType
	atToolUses
	atMessages
	atMessage
	atContent // an array of blocks
	atBlock
	atInner // an array of blocks in a block, as in a tool's result
	atInnerBlock
	atBlockType
	atSource
	atSourceType
	atSourceData
	atTTL
)

// member returns the place of an object's member.
func member(of place, key string) place {
	switch of {
	case atTop:
		switch key {
		case "model":
			return atModel
		case "max_tokens":
			return atMaxTokens
		case "stream":
			return atStreaming
		case "speed":
			return atSpeed
		case "inference_geo":
			return atGeography
		case "thinking":
			return atThinking
		case "fallbacks":
			return atFallbacks
		case "mcp_servers":
			return atMcpServers
		case "context_management":
			return atManagement
		case "tools":
			return atTools
		case "messages":
			return atMessages
		}
	case atThinking:
		if key == "budget_tokens" {
			return atThinkingBudget
		}
	case atFallback:
		if key == "model" {
			return atFallbackModel
		}
	case atManagement:
		if key == "edits" {
			return atEdits
		}
	case atEdit:
		if key == "type" {
			return atEditType
		}
	case atTool:
		switch key {
		case "type":
			return atToolType
		case "max_uses":
			return atToolUses
		}
	case atMessage:
		if key == "content" {
			return atContent
		}
	case atBlock, atInnerBlock:
		switch key {
		case "type":
			return atBlockType
		case "source":
			return atSource
		case "content":
			if of == atBlock {
				return atInner
			}
		}
	case atSource:
		switch key {
		case "type":
			return atSourceType
		case "data":
			return atSourceData
		}
	}
	if key == "ttl" {
		return atTTL
	}
	return atElsewhere
}

// element returns the place of an array's elements.
func element(of place) place {
	switch of {
	case atFallbacks:
		return atFallback
	case atMcpServers:
		return atMcpServer
	case atEdits:
		return atEdit
	case atTools:
		return atTool
	case atMessages:
		return atMessage
	case atContent:
		return atBlock
	case atInner:
		return atInnerBlock
	}
	return atElsewhere
}

// A frame is what the scanner remembers of an object while it is inside.
type frame struct {
	place  place
	keys   map[string]bool // of the top object, and of large ones
	names  []string        // of small ones
	later  bool            // a tool that the API loads when it is asked for
	start  int             // in the body
	size   int             // in bytes, once it has ended
	kind   string          // the string under "type"
	kinds  int             // how many "type"s there are
	uses   int64           // max_uses; -1: not said
	from   *frame          // the last "source"
	froms  int
	data   int // bytes of the string under "data"
	datas  int
	parent *frame
}

// A scanner walks a request once, without building a tree: requests have up to
// 40 MiB and a call must not pay for that with milliseconds. It is exact about
// where strings, objects and numbers begin and end, and lax about what upstream
// refuses anyway, such as an unknown escape in a string that does not matter.
type scanner struct {
	b     []byte
	i     int
	depth int
	out   *request
}

// maxDepth bounds the recursion.
const maxDepth = 500

func (s *scanner) document() error {
	s.space()
	if s.i >= len(s.b) || s.b[s.i] != '{' {
		return errJSON
	}
	if err := s.value(atTop, nil); err != nil {
		return err
	}
	s.space()
	if s.i != len(s.b) {
		return errJSON
	}
	return nil
}

func (s *scanner) space() {
	for s.i < len(s.b) {
		switch s.b[s.i] {
		case ' ', '\t', '\n', '\r':
			s.i++
		default:
			return
		}
	}
}

func (s *scanner) value(at place, in *frame) error {
	s.space()
	if s.i >= len(s.b) {
		return errJSON
	}
	switch c := s.b[s.i]; c {
	case '{':
		return s.object(at, in)
	case '[':
		return s.array(at, in)
	case '"':
		raw, err := s.str()
		if err != nil {
			return err
		}
		return s.text(at, in, raw)
	case 't':
		s.out.stream = s.out.stream || at == atStreaming
		return s.literal("true")
	case 'f':
		return s.literal("false")
	case 'n':
		return s.literal("null")
	default:
		start := s.i
		if err := s.number(); err != nil {
			return err
		}
		return s.amount(at, in, start)
	}
}

func (s *scanner) object(at place, in *frame) error {
	if s.depth++; s.depth > maxDepth {
		return fmt.Errorf("the body is nested more than %d deep", maxDepth)
	}
	f := frame{place: at, uses: -1, parent: in, start: s.i}
	if at == atTop {
		f.keys = make(map[string]bool)
	}
	s.i++ // {
	for first := true; ; first = false {
		s.space()
		if s.i < len(s.b) && s.b[s.i] == '}' && first {
			break
		}
		key, err := s.str()
		if err != nil {
			return err
		}
		name, err := unquote(key)
		if err != nil {
			return err
		}
		// Which of two equal keys counts is up to the reader. What is metered
		// must be what is billed, so there is no reading of such a body.
		if f.twice(name) {
			if at == atTop {
				return fmt.Errorf("the body has %q twice", name)
			}
			s.out.unsure = true
		}
		f.later = f.later || at == atTool && name == "defer_loading"
		s.space()
		if s.i >= len(s.b) || s.b[s.i] != ':' {
			return errJSON
		}
		s.i++
		s.space()
		start := s.i
		if err := s.value(member(at, name), &f); err != nil {
			return err
		}
		if at == atTop {
			s.out.members = append(s.out.members, span{name, start, s.i})
		}
		s.space()
		if s.i >= len(s.b) {
			return errJSON
		}
		if s.b[s.i] == '}' {
			break
		}
		if s.b[s.i] != ',' {
			return errJSON
		}
		s.i++
	}
	s.i++ // }
	s.depth--
	f.size = s.i - f.start
	s.out.object(at, &f)
	return nil
}

// twice notes a key of the object and reports whether it had it before.
func (f *frame) twice(name string) bool {
	const small = 32
	if f.keys == nil {
		if slices.Contains(f.names, name) {
			return true
		}
		if f.names = append(f.names, name); len(f.names) <= small {
			return false
		}
		f.keys = make(map[string]bool, 2*small)
		for _, n := range f.names {
			f.keys[n] = true
		}
		return false
	}
	if f.keys[name] {
		return true
	}
	f.keys[name] = true
	return false
}

func (s *scanner) array(at place, in *frame) error {
	if s.depth++; s.depth > maxDepth {
		return fmt.Errorf("the body is nested more than %d deep", maxDepth)
	}
	s.i++ // [
	for first := true; ; first = false {
		s.space()
		if s.i < len(s.b) && s.b[s.i] == ']' && first {
			break
		}
		if err := s.value(element(at), in); err != nil {
			return err
		}
		s.space()
		if s.i >= len(s.b) {
			return errJSON
		}
		if s.b[s.i] == ']' {
			break
		}
		if s.b[s.i] != ',' {
			return errJSON
		}
		s.i++
	}
	s.i++ // ]
	s.depth--
	return nil
}

// str returns what is between the quotes.
func (s *scanner) str() ([]byte, error) {
	if s.i >= len(s.b) || s.b[s.i] != '"' {
		return nil, errJSON
	}
	s.i++
	start := s.i
	for {
		n := bytes.IndexByte(s.b[s.i:], '"')
		if n < 0 {
			return nil, errJSON
		}
		end := s.i + n
		slashes := 0
		for end-slashes > start && s.b[end-slashes-1] == '\\' {
			slashes++
		}
		s.i = end + 1
		if slashes%2 == 0 {
			return s.b[start:end], nil
		}
	}
}

func (s *scanner) literal(word string) error {
	if !bytes.HasPrefix(s.b[s.i:], []byte(word)) {
		return errJSON
	}
	s.i += len(word)
	return nil
}

// number takes one number of JSON's grammar.
func (s *scanner) number() error {
	digits := func() int {
		start := s.i
		for s.i < len(s.b) && s.b[s.i] >= '0' && s.b[s.i] <= '9' {
			s.i++
		}
		return s.i - start
	}
	is := func(chars string) bool {
		if s.i < len(s.b) && bytes.IndexByte([]byte(chars), s.b[s.i]) >= 0 {
			s.i++
			return true
		}
		return false
	}
	is("-")
	zero := s.i < len(s.b) && s.b[s.i] == '0'
	if n := digits(); n == 0 || zero && n > 1 {
		return errJSON
	}
	if is(".") && digits() == 0 {
		return errJSON
	}
	if is("eE") {
		is("+-")
		if digits() == 0 {
			return errJSON
		}
	}
	return nil
}

// text is a string at a place.
func (s *scanner) text(at place, in *frame, raw []byte) error {
	switch at {
	case atModel, atFallbackModel, atSpeed, atGeography, atBlockType, atSourceType, atToolType, atEditType, atTTL:
	case atSourceData:
		in.data, in.datas = len(raw), in.datas+1
		return nil
	case atMaxTokens, atThinkingBudget, atToolUses:
		return errors.New("the body has a string where a number of tokens belongs")
	default:
		return nil // what it says does not matter
	}
	v, err := unquote(raw)
	if err != nil {
		return err
	}
	switch at {
	case atModel:
		s.out.model = v
	case atFallbackModel:
		s.out.fallbacks = append(s.out.fallbacks, v)
	case atSpeed:
		s.out.fast = s.out.fast || v != "standard"
	case atGeography:
		s.out.regional = s.out.regional || v != "global"
	case atBlockType, atSourceType, atToolType, atEditType:
		in.kind, in.kinds = v, in.kinds+1
	case atTTL:
		s.out.hour = s.out.hour || v == "1h"
	}
	return nil
}

// amount is a number at a place; it begins at start and ends where s stands.
func (s *scanner) amount(at place, in *frame, start int) error {
	var to *int64
	switch at {
	case atMaxTokens:
		to = &s.out.maxTokens
		s.out.maxAt, s.out.maxEnd = start, s.i
	case atThinkingBudget:
		to = &s.out.thinking
	case atToolUses:
		to = &in.uses
	default:
		return nil
	}
	v, err := strconv.ParseInt(string(s.b[start:s.i]), 10, 64)
	if err != nil || v < 0 || v > maxCount {
		return fmt.Errorf("%.40q is not a number of tokens", s.b[start:s.i])
	}
	*to = v
	return nil
}

// maxCount is more tokens than any call has.
const maxCount = 1 << 32

// unquote decodes what is between the quotes of a string.
func unquote(raw []byte) (string, error) {
	if bytes.IndexByte(raw, '\\') < 0 {
		return string(raw), nil
	}
	quoted := make([]byte, 0, len(raw)+2)
	quoted = append(append(append(quoted, '"'), raw...), '"')
	var v string
	if err := json.Unmarshal(quoted, &v); err != nil {
		return "", errJSON
	}
	return v, nil
}
