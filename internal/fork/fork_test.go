package fork

import (
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func TestUSDSurvivesJSONToTheLastNanoDollar(t *testing.T) {
	for range 2000 {
		want := USD(rand.Int64N(9e15))
		b, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		var got USD
		if err := json.Unmarshal(b, &got); err != nil || got != want {
			t.Fatalf("%d -> %s -> %d, %v", want, b, got, err)
		}
	}
	var noisy USD
	if err := json.Unmarshal([]byte("0.009733200000000001"), &noisy); err != nil || noisy != 9_733_200 {
		t.Errorf("float noise: %d, %v", noisy, err)
	}
}

func TestParseUSDRefusesWhatIsNoAmount(t *testing.T) {
	for _, s := range []string{"", ".", "-1", "NaN", "Inf", "1e3", "1.0000000001", "0x10", "ten", "99999999999999999999", "1.2.3", "1 "} {
		if v, err := ParseUSD(s); err == nil {
			t.Errorf("%q was read as %s", s, v)
		}
	}
	for s, want := range map[string]USD{"10": 10 * Dollar, "0.25": Dollar / 4, ".5": Dollar / 2, "$3": 3 * Dollar, "0.000000001": 1} {
		if v, err := ParseUSD(s); err != nil || v != want {
			t.Errorf("%q: %s, %v", s, v, err)
		}
	}
}

func TestUSDReadsLikeMoney(t *testing.T) {
	for v, want := range map[USD]string{0: "$0.0000", Dollar: "$1.0000", 9_733_200: "$0.0097332", -Dollar / 2: "-$0.5000"} {
		if got := v.String(); got != want {
			t.Errorf("%d: %s, want %s", int64(v), got, want)
		}
	}
}

func TestPlanRefusesWhatCannotBe(t *testing.T) {
	good := Plan{Repo: "r", Prompt: "do it", Forks: 1, Model: "sonnet", MaxConcurrent: 1, Timeout: time.Hour, Provider: "local", Agent: "claude"}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Plan){
		"no repository":      func(p *Plan) { p.Repo = "" },
		"empty prompt":       func(p *Plan) { p.Prompt = " \n\t" },
		"prompt too long":    func(p *Plan) { p.Prompt = strings.Repeat("x", MaxPrompt+1) },
		"prompt with NUL":    func(p *Plan) { p.Prompt = "a\x00b" },
		"no forks":           func(p *Plan) { p.Forks = 0 },
		"negative forks":     func(p *Plan) { p.Forks = -1 },
		"too many forks":     func(p *Plan) { p.Forks = MaxForks + 1 },
		"no slots":           func(p *Plan) { p.MaxConcurrent = 0 },
		"no time":            func(p *Plan) { p.Timeout = 0 },
		"negative budget":    func(p *Plan) { p.Budget = -1 },
		"command without it": func(p *Plan) { p.Agent = "command" },
		"empty verification": func(p *Plan) { p.Verify = " " },
		"NUL in it":          func(p *Plan) { p.Verify = "a\x00b" },
		"it without command": func(p *Plan) { p.AgentCommand = "x" },
	} {
		p := good
		spoil(&p)
		err := p.Validate()
		if fault.KindOf(err) != fault.Invalid || fault.HintOf(err) == "" {
			t.Errorf("%s: %v (hint %q)", name, err, fault.HintOf(err))
		}
	}
}

func TestCutKeepsWholeRunes(t *testing.T) {
	s := strings.Repeat("é", 100)
	for n := range 120 {
		got := Cut(s, n)
		if !utf8.ValidString(got) {
			t.Fatalf("cut at %d broke a rune", n)
		}
		if n >= 20 && len(got) > n {
			t.Fatalf("cut at %d left %d bytes", n, len(got))
		}
	}
	if Cut("short", 10) != "short" {
		t.Error("cut what fits")
	}
}

func TestParseID(t *testing.T) {
	for s, want := range map[string]int{"sandbox-orch-1": 0, "r/1": 1, "r/1000": 1000} {
		if _, n, ok := ParseID(s); !ok || n != want {
			t.Errorf("%q: %d, %v", s, n, ok)
		}
	}
	for _, s := range []string{"", "/1", "r/0", "r/x", "r/-1", "r/1001", "r/1/2"} {
		if _, _, ok := ParseID(s); ok {
			t.Errorf("%q was taken", s)
		}
	}
}
