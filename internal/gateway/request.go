package gateway

import (
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/openai"
)

// A request is what the price of a call depends on.
type request struct {
	model     string
	fallbacks []string // models that may answer in its place
	maxTokens int64    // 0 when the body names none
	maxAt     int      // where the number stands in the body
	maxEnd    int
	thinking  int64 // budget_tokens, which max_tokens must exceed
	stream    bool
	hour      bool // something is to be cached for an hour
	fast      bool // asks for the dear fast mode
	regional  bool // asks for inference in one place, at another price
	compacts  bool // the API may summarise the prompt first, in a call of its own

	body     int   // bytes
	pixels   int   // bytes of pictures, which are not billed by the byte
	pictures int64 // how many there are
	papers   int   // bytes of documents
	remote   int64 // pictures and documents that the API fetches by itself
	uses     int64 // how often server tools may run; at most maxUses
	endless  bool  // nobody says how often one of them may
	advisor  bool  // has a tool that asks another model

	answers  int64           // that are asked for; 0: one
	unpriced string          // something else without a price, in words
	openai   *openai.Request // the call as OpenAI's API reads it; nil: it is not for that
	members  []span          // of the top object
	apart    int             // bytes of what the API leaves out of some prompts, and not of others
	unsure   bool            // how long its prompt is says nothing about others: see prompts
}

// A span is a member of the body and where its value stands.
type span struct {
	key        string
	start, end int
}

// readRequest finds everything in body that the price depends on. The error
// says what is wrong with the body, for the agent to read.
func readRequest(body []byte) (*request, error) {
	if !utf8.Valid(body) {
		return nil, errJSON
	}
	q := &request{body: len(body)}
	s := scanner{b: body, out: q}
	if err := s.document(); err != nil {
		return nil, err
	}
	q.read()
	return q, nil
}

// read is called when all of the request was scanned.
func (q *request) read() {
	q.uses = min(q.uses, maxUses)
	q.unsure = q.unsure || q.pictures > 0 || q.papers > 0 || q.remote > 0 || q.uses > 0 || q.compacts || q.advisor || len(q.fallbacks) > 0
}

// models lists who may answer.
func (q *request) models() []string { return append([]string{q.model}, q.fallbacks...) }

// object is called at the end of every object of a known place.
func (q *request) object(at place, f *frame) {
	switch at {
	case atSource:
		f.parent.from, f.parent.froms = f, f.parent.froms+1
	case atBlock, atInnerBlock:
		if strings.HasSuffix(f.kind, "thinking") || f.kinds > 1 {
			q.apart += f.size
		}
		q.media(f)
	case atMcpServer:
		q.uses += defaultUses
		q.endless = true
	case atEdit:
		q.compacts = q.compacts || strings.HasPrefix(f.kind, "compact")
		q.unsure = q.unsure || !strings.HasPrefix(f.kind, "clear_thinking") || f.kinds != 1
	case atTool:
		if f.later {
			q.apart += f.size
		}
		switch {
		case f.kinds == 0 || runsWithAgent(f.kind):
		case strings.HasPrefix(f.kind, "advisor"):
			q.advisor = true
		case f.uses >= 0:
			q.uses += f.uses
		default:
			q.uses += defaultUses
			q.endless = true
		}
	}
}

// media counts a picture or a document. Only a block whose reading is beyond
// doubt counts as a picture: the same bytes anywhere else, say in the arguments
// of a tool, are text to the API and are billed as such.
func (q *request) media(f *frame) {
	src := f.from
	if src == nil || f.kind != "image" && f.kind != "document" {
		return
	}
	sure := f.kinds == 1 && f.froms == 1 && src.kinds == 1
	switch {
	case sure && f.kind == "image" && src.kind == "base64" && src.datas == 1:
		q.pictures++
		q.pixels += src.data
	case sure && f.kind == "document" && src.kind == "base64" && src.datas == 1:
		q.papers += src.data
	case src.kind == "url" || src.kind == "file":
		q.remote++
	}
}

// runsWithAgent reports whether a tool of that type costs nothing but the
// tokens that the bodies show.
func runsWithAgent(kind string) bool {
	for _, prefix := range []string{"custom", "bash_", "text_editor_", "computer_", "memory_", "tool_search_"} {
		if strings.HasPrefix(kind, prefix) {
			return true
		}
	}
	return false
}

// The assumptions about what the API makes of a request.
const (
	// bytesPerToken is what agents' requests have at least, JSON included, when
	// they are not made to have less: they were measured at four; code and prose
	// in English lie between 3.5 and 4.5. Only what was seen of an answer that
	// broke off is reckoned with it.
	bytesPerToken = 3

	// overhead is the API's own prompt around tools, in tokens.
	overhead = 500

	// pictureTokens is above what the largest picture comes to after the API
	// has scaled it down (4784 tokens).
	pictureTokens = 5000

	// searchTokens is what one use of a server tool puts into the prompt.
	searchTokens = 25_000

	// defaultUses is how often a server tool runs when nobody says.
	defaultUses = 10

	// maxUses is more than the API does in one call, and keeps sums small.
	maxUses = 10_000

	// window is the longest prompt there is: longer ones are refused upstream
	// and cost nothing.
	window = 1_000_000
)

// An ask is the most that a call can cost, and what that was reckoned from.
type ask struct {
	ledger.Ask
	prompt int64 // tokens that may be billed for it, all rounds together
}

// Fewer output tokens than this make an agent stumble: its answer ends in the
// middle of a tool call.
const (
	leastOutput  = 1024
	enoughOutput = 4096
)

// estimate says what q can cost at most, if all of its prompt is written to the
// cache at the dearest rate that the body asks for, and the answer is as long as
// max_tokens allows. The prompt has at most one token for every byte of its
// text, and at most known, where known is not negative: see prompts.
func (p *Prices) estimate(q *request, maxOutput, known int64) ask {
	a := ask{Ask: ledger.Ask{Want: q.want(maxOutput)}}
	for _, s := range p.shares(q, known) {
		a.prompt += s.read
		a.Fixed = plus(a.Fixed, plus(s.prompt, s.tools))
		a.PerToken = plus(a.PerToken, s.perToken)
	}
	a.Least = min(a.Want, max(leastOutput, q.thinkingFloor()))
	a.Enough = min(a.Want, max(enoughOutput, q.thinkingFloor()))
	return a
}

// want is how long an answer may be, as far as the gateway lets it.
func (q *request) want(maxOutput int64) int64 {
	return min(q.maxTokens, max(maxOutput, q.thinkingFloor()))
}

// A share is the most that one of the models which may answer can cost.
type share struct {
	model    string
	read     int64    // tokens of the prompt, all rounds together
	prompt   fork.USD // for these
	tools    fork.USD // for the API's tools
	perToken fork.USD // for each token of the answer
}

// shares is what estimate is reckoned from.
func (p *Prices) shares(q *request, known int64) []share {
	// A document's text is compressed, so it has more tokens than its bytes
	// tell; one per byte, and never more than fits, is what can be said.
	prompt := int64(q.body-q.pixels) + q.pictures*pictureTokens
	if known >= 0 {
		prompt = min(prompt, known)
	}
	prompt = min(prompt+overhead, window)
	if q.remote > 0 {
		prompt = window
	}
	rounds := int64(1)
	if q.compacts {
		rounds = 2
	}
	// Each model that may answer can do so after the one before it has been
	// paid for.
	var all []share
	for _, name := range q.models() {
		m, _ := p.lookup(name)
		rate := m.rate(prompt)
		// A server tool's result becomes a prompt that is read again.
		read := rounds * (prompt + q.uses*min(prompt+searchTokens, window))
		all = append(all, share{
			model: name, read: read,
			prompt:   times(read, rate.write(q.hour)/perMillion),
			tools:    times(rounds*q.uses, p.webSearch),
			perToken: times(rounds*max(q.answers, 1), rate.Output/perMillion),
		})
	}
	return all
}

// thinkingFloor is how far max_tokens can be lowered: the API refuses a call
// whose thinking could use up all of it.
func (q *request) thinkingFloor() int64 {
	if q.thinking == 0 {
		return 0
	}
	return q.thinking + 1
}

// clamp returns body with n in place of its max_tokens. No other byte changes,
// so that what the agent cached stays cached.
func (q *request) clamp(body []byte, n int64) []byte {
	if q.openai != nil {
		return q.openai.Clamp(body, n)
	}
	if q.maxEnd == 0 || n >= q.maxTokens {
		return body
	}
	out := make([]byte, 0, len(body))
	out = append(out, body[:q.maxAt]...)
	out = strconv.AppendInt(out, n, 10)
	return append(out, body[q.maxEnd:]...)
}
