package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

const hush = "sk-ant-Very-Secret-123"

func full() Secrets {
	return Secrets{AnthropicKey: hush + "1", AnthropicAuthToken: hush + "2", AnthropicBaseURL: "https://api.example.com",
		GitHubToken: hush + "3", GitHubServer: "https://git.example.com", E2BKey: hush + "4",
		E2B:   E2B{APIURL: "https://e2b.example.com", Domain: "example.org:8443", Debug: true, CAFile: "/ca.pem", Template: "mine", Plan: "pro"},
		Store: Store{KeyID: "AKIA1", Secret: hush + "5", Session: hush + "6"}}
}

func TestSecretsAreReadFromTheEnvironment(t *testing.T) {
	got, err := ReadSecrets(vars{
		"ANTHROPIC_API_KEY": " " + hush + "1\r\n", "ANTHROPIC_AUTH_TOKEN": hush + "2", "ANTHROPIC_BASE_URL": "https://api.example.com/",
		"GITHUB_TOKEN": hush + "3", "GITHUB_SERVER_URL": "https://git.example.com", "E2B_API_KEY": hush + "4",
		"E2B_API_URL": "https://e2b.example.com/", "E2B_DOMAIN": "example.org:8443", "E2B_DEBUG": "true", "SANDBOX_TEMPORAL_E2B_CA": "/ca.pem",
		"SANDBOX_TEMPORAL_E2B_TEMPLATE": "mine", "SANDBOX_TEMPORAL_E2B_PLAN": "pro",
		"AWS_ACCESS_KEY_ID": "AKIA1", "AWS_SECRET_ACCESS_KEY": hush + "5", "AWS_SESSION_TOKEN": hush + "6",
	}.get)
	if err != nil || got != full() {
		t.Errorf("%v: %s", err, got)
	}
	got, err = ReadSecrets(vars{}.get)
	if err != nil || got != (Secrets{GitHubServer: "https://github.com"}) {
		t.Errorf("%v: %s", err, got)
	}
}

func TestBadSecretsAreRefusedAndNotQuoted(t *testing.T) {
	for name, value := range map[string]string{
		"ANTHROPIC_BASE_URL":    "api.example.com",
		"GITHUB_SERVER_URL":     "https://me:" + hush + "@git.example.com",
		"ANTHROPIC_API_KEY":     hush + " " + hush,
		"ANTHROPIC_AUTH_TOKEN":  hush + "\nX-Header: y",
		"GITHUB_TOKEN":          "‘" + hush + "’",
		"E2B_API_KEY":           hush + "\x00",
		"AWS_SECRET_ACCESS_KEY": hush + " " + hush,
	} {
		_, err := ReadSecrets(vars{name: value}.get)
		if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), name) || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
		if strings.Contains(fmt.Sprint(err, fault.HintOf(err)), hush) {
			t.Errorf("%s: the error shows the secret: %v", name, err)
		}
	}
}

// However secrets are printed, logged or encoded, alone or in something else,
// they do not show.
func TestSecretsDoNotShow(t *testing.T) {
	s := full()
	wrapped := struct {
		S  Secrets
		P  *Secrets
		M  map[string]Secret
		In any
	}{s, &s, map[string]Secret{"k": s.E2BKey}, []Secret{s.AnthropicKey}}
	var out strings.Builder
	for _, v := range []any{s, &s, s.AnthropicKey, &s.AnthropicKey, wrapped, &wrapped} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%T"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		out.Write(b)
	}
	var log bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(h).Info("look", "s", s, "p", &s, "k", s.GitHubToken, "w", wrapped)
	}
	out.Write(log.Bytes())
	for _, shape := range []string{hush, fmt.Sprintf("%x", hush), fmt.Sprintf("%X", hush)} {
		if i := strings.Index(out.String(), shape); i >= 0 {
			t.Errorf("a secret shows: …%s", out.String()[max(0, i-60):i+len(shape)])
		}
	}
	if !strings.Contains(out.String(), "(set)") || Secret("").String() != "(not set)" {
		t.Error("nothing tells whether a secret is set")
	}
}

func TestRevealedSecretsCanBeReadBack(t *testing.T) {
	b, err := full().Reveal()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ParseSecrets(b); err != nil || got != full() {
		t.Errorf("%v: %s", err, got)
	}
	if got, err := ParseSecrets([]byte(`{"a_key_of_a_later_version": 1}`)); err != nil || got != (Secrets{}) {
		t.Errorf("%v: %s", err, got)
	}
	for _, bad := range []string{"", "{", `"` + hush + `"`, `{"anthropic_key": 7}`} {
		if _, err := ParseSecrets([]byte(bad)); fault.KindOf(err) != fault.Invalid || strings.Contains(err.Error(), hush) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	// What hides them cannot be read back by mistake.
	hidden, err := json.Marshal(full())
	if err != nil {
		t.Fatal(err)
	}
	var s Secrets
	var k Secret
	if json.Unmarshal(hidden, &s) == nil || json.Unmarshal([]byte(`"x"`), &k) == nil {
		t.Error("the hidden form was taken for the secrets")
	}
}

func TestKeysStayWithTheirAddresses(t *testing.T) {
	older := full()
	if got := (Secrets{}).Or(older); got != older {
		t.Errorf("nothing new: %s", got)
	}
	// A new key without an address is for Anthropic's own, not for the one
	// that the older key went to.
	got := Secrets{AnthropicKey: "new"}.Or(older)
	if got.AnthropicKey != "new" || got.AnthropicAuthToken != "" || got.AnthropicBaseURL != "" || got.E2BKey != older.E2BKey {
		t.Errorf("%s at %q", got, got.AnthropicBaseURL)
	}
	// And an address without a key does not get the older key.
	got = Secrets{AnthropicBaseURL: "https://elsewhere.example.com"}.Or(older)
	if got.AnthropicBaseURL != older.AnthropicBaseURL || got.AnthropicKey != older.AnthropicKey {
		t.Errorf("%s at %q", got, got.AnthropicBaseURL)
	}
	got = Secrets{GitHubToken: "new", GitHubServer: "https://github.com"}.Or(older)
	if got.GitHubToken != "new" || got.GitHubServer != "https://github.com" || got.AnthropicKey != older.AnthropicKey {
		t.Errorf("%s at %q", got, got.GitHubServer)
	}
	got = Secrets{Store: Store{KeyID: "AKIA2", Secret: "new"}}.Or(older)
	if got.Store.Secret != "new" || got.Store.Session != "" {
		t.Errorf("%s", got)
	}
}

// Whoever has keys of Amazon's in the environment may have them for something
// else than our artifacts.
func TestKeysOfAnArtifactStoreAreLentForThatStoreOnly(t *testing.T) {
	const mine, other = "s3://mine?region=r", "s3://other?region=r"
	for place, want := range map[string]Store{
		"":                      {},
		"/srv/artifacts":        {},
		"file:///srv/artifacts": {},
		mine:                    {"AKIA1", hush + "5", hush + "6", mine},
	} {
		if got := full().LentFor(place).Store; got != want {
			t.Errorf("%q: %+v", place, got)
		}
	}
	lent := full().LentFor(mine)
	if lent.StoreAt(mine).Secret == "" || lent.StoreAt(other) != (Store{}) || full().StoreAt(other).Secret == "" {
		t.Error("keys go to a store that they were not lent for, or not to theirs")
	}
	if b, err := full().LentFor("").Reveal(); err != nil || bytes.Contains(b, []byte(hush+"5")) {
		t.Errorf("keys are kept that nobody asked for, %v", err)
	}
}
