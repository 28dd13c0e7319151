package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A Secret is a text that must not be shown. Whatever prints it, logs it or
// writes it as JSON shows only whether it is set; string(s) is the text.
type Secret string

var (
	_ fmt.Formatter  = Secret("")
	_ slog.LogValuer = Secret("")
	_ json.Marshaler = Secret("")
)

// String returns "(set)" or "(not set)".
func (s Secret) String() string {
	if s == "" {
		return "(not set)"
	}
	return "(set)"
}

// GoString returns the same as String.
func (s Secret) GoString() string { return s.String() }

// Format writes the same as String for every verb, so that %x and %q tell no
// more than %s.
func (s Secret) Format(f fmt.State, _ rune) { fmt.Fprint(f, s.String()) }

// LogValue returns the same as String.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalJSON writes the same as String.
func (s Secret) MarshalJSON() ([]byte, error) { return json.Marshal(s.String()) }

// UnmarshalJSON fails: what MarshalJSON wrote must not be taken for the
// secret. See [ParseSecrets].
func (s *Secret) UnmarshalJSON([]byte) error {
	return errors.New("a secret is read by ParseSecrets only")
}

// Secrets are the credentials that this process was given. They are kept out
// of [Config], out of Temporal and out of every sandbox. The addresses stand
// beside the keys because a key goes to one address and to no other.
type Secrets struct {
	AnthropicKey       Secret // ANTHROPIC_API_KEY
	AnthropicAuthToken Secret // ANTHROPIC_AUTH_TOKEN, sent as a bearer token
	AnthropicBaseURL   string // ANTHROPIC_BASE_URL; empty: Anthropic's own
	OpenAIKey          Secret // OPENAI_API_KEY
	OpenAIBaseURL      string // OPENAI_BASE_URL; empty: OpenAI's own
	GitHubToken        Secret // GITHUB_TOKEN
	GitHubServer       string // GITHUB_SERVER_URL, the only server that the token is for
	E2BKey             Secret // E2B_API_KEY
	E2B                E2B    // where that key is for
	Store              Store  // opens the artifact store
}

// Store are keys of an artifact store that speaks S3, as whoever has them in
// the environment. Without, they are in files, or the host has a role.
type Store struct {
	KeyID   string // AWS_ACCESS_KEY_ID
	Secret  Secret // AWS_SECRET_ACCESS_KEY
	Session Secret // AWS_SESSION_TOKEN
	For     string // the one store that they were lent for; empty: they were not lent
}

// LentFor returns s for an engine whose artifact store is at place: a key of
// Amazon's that opens something else is nobody's business there.
func (s Secrets) LentFor(place string) Secrets {
	if !strings.HasPrefix(place, "s3://") || s.Store.KeyID == "" {
		s.Store = Store{}
		return s
	}
	s.Store.For = place
	return s
}

// StoreAt returns the keys for the artifact store at place.
func (s Secrets) StoreAt(place string) Store {
	if s.Store.For != "" && s.Store.For != place {
		return Store{}
	}
	return s.Store
}

// E2B says where sandboxes of E2B are made, and of what. Empty: as E2B has it.
type E2B struct {
	APIURL     string `json:"api_url,omitempty"`     // E2B_API_URL
	Domain     string `json:"domain,omitempty"`      // E2B_DOMAIN
	SandboxURL string `json:"sandbox_url,omitempty"` // E2B_SANDBOX_URL
	Debug      bool   `json:"debug,omitempty"`       // E2B_DEBUG
	CAFile     string `json:"ca_file,omitempty"`     // SANDBOX_TEMPORAL_E2B_CA
	Template   string `json:"template,omitempty"`    // SANDBOX_TEMPORAL_E2B_TEMPLATE
	Plan       string `json:"plan,omitempty"`        // SANDBOX_TEMPORAL_E2B_PLAN
}

// Texts returns the secrets that are set, for who keeps them out of what is
// written.
func (s Secrets) Texts() []string {
	var all []string
	for _, secret := range []Secret{s.AnthropicKey, s.AnthropicAuthToken, s.OpenAIKey, s.GitHubToken, s.E2BKey, s.Store.Secret, s.Store.Session} {
		if secret != "" {
			all = append(all, string(secret))
		}
	}
	return all
}

const defaultGitHub = "https://github.com"

// ReadSecrets reads the credentials from the environment. Space around them
// is dropped: it comes from files and never belongs to a key. An address that
// is none is a fault of kind Invalid.
func ReadSecrets(getenv func(string) string) (Secrets, error) {
	get := func(name string) string { return strings.TrimSpace(getenv(name)) }
	s := Secrets{
		AnthropicKey:       Secret(get("ANTHROPIC_API_KEY")),
		AnthropicAuthToken: Secret(get("ANTHROPIC_AUTH_TOKEN")),
		AnthropicBaseURL:   strings.TrimRight(get("ANTHROPIC_BASE_URL"), "/"),
		OpenAIKey:          Secret(get("OPENAI_API_KEY")),
		OpenAIBaseURL:      strings.TrimRight(get("OPENAI_BASE_URL"), "/"),
		GitHubToken:        Secret(get("GITHUB_TOKEN")),
		GitHubServer:       strings.TrimRight(get("GITHUB_SERVER_URL"), "/"),
		E2BKey:             Secret(get("E2B_API_KEY")),
		E2B: E2B{
			APIURL: strings.TrimRight(get("E2B_API_URL"), "/"), Domain: get("E2B_DOMAIN"), SandboxURL: strings.TrimRight(get("E2B_SANDBOX_URL"), "/"),
			Debug: strings.EqualFold(get("E2B_DEBUG"), "true"), CAFile: get("SANDBOX_TEMPORAL_E2B_CA"),
			Template: get("SANDBOX_TEMPORAL_E2B_TEMPLATE"), Plan: get("SANDBOX_TEMPORAL_E2B_PLAN"),
		},
		Store: Store{KeyID: get("AWS_ACCESS_KEY_ID"), Secret: Secret(get("AWS_SECRET_ACCESS_KEY")), Session: Secret(get("AWS_SESSION_TOKEN"))},
	}
	if s.GitHubServer == "" {
		s.GitHubServer = defaultGitHub
	}
	for name, addr := range map[string]string{"ANTHROPIC_BASE_URL": s.AnthropicBaseURL, "OPENAI_BASE_URL": s.OpenAIBaseURL, "GITHUB_SERVER_URL": s.GitHubServer, "E2B_API_URL": s.E2B.APIURL} {
		if err := webAddress(addr); err != nil {
			return Secrets{}, fault.New(op, fault.Invalid, "%s: %w", name, err).
				Hinted("Set %s to an address such as https://example.com, or unset it.", name)
		}
	}
	for name, secret := range map[string]Secret{"ANTHROPIC_API_KEY": s.AnthropicKey, "ANTHROPIC_AUTH_TOKEN": s.AnthropicAuthToken, "OPENAI_API_KEY": s.OpenAIKey, "GITHUB_TOKEN": s.GitHubToken, "E2B_API_KEY": s.E2BKey,
		"AWS_ACCESS_KEY_ID": Secret(s.Store.KeyID), "AWS_SECRET_ACCESS_KEY": s.Store.Secret, "AWS_SESSION_TOKEN": s.Store.Session} {
		if strings.ContainsFunc(string(secret), func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
			return Secrets{}, fault.New(op, fault.Invalid, "%s holds a space, a line break or a letter that no key has", name).
				Hinted("Copy the key again, without anything around it.")
		}
	}
	return s, nil
}

// Or returns s, with what s lacks taken from older. What belongs together is
// taken together: a key never goes to an address that it was not given with.
func (s Secrets) Or(older Secrets) Secrets {
	if s.AnthropicKey == "" && s.AnthropicAuthToken == "" {
		s.AnthropicKey, s.AnthropicAuthToken, s.AnthropicBaseURL = older.AnthropicKey, older.AnthropicAuthToken, older.AnthropicBaseURL
	}
	if s.OpenAIKey == "" {
		s.OpenAIKey, s.OpenAIBaseURL = older.OpenAIKey, older.OpenAIBaseURL
	}
	if s.GitHubToken == "" {
		s.GitHubToken, s.GitHubServer = older.GitHubToken, older.GitHubServer
	}
	if s.E2BKey == "" && !s.E2B.Debug {
		s.E2BKey, s.E2B = older.E2BKey, older.E2B
	}
	if s.Store.KeyID == "" {
		s.Store = older.Store
	}
	return s
}

// revealed is the form of Secrets in the engine's file and on its socket.
type revealed struct {
	AnthropicKey       string `json:"anthropic_key,omitempty"`
	AnthropicAuthToken string `json:"anthropic_auth_token,omitempty"`
	AnthropicBaseURL   string `json:"anthropic_base_url,omitempty"`
	GitHubToken        string `json:"github_token,omitempty"`
	GitHubServer       string `json:"github_server,omitempty"`
	E2BKey             string `json:"e2b_key,omitempty"`
	E2B                E2B    `json:"e2b,omitzero"`
	OpenAIKey          string `json:"openai_key,omitempty"`
	OpenAIBaseURL      string `json:"openai_base_url,omitempty"`
	StoreKeyID         string `json:"store_key_id,omitempty"`
	StoreSecret        string `json:"store_secret,omitempty"`
	StoreSession       string `json:"store_session,omitempty"`
	StoreFor           string `json:"store_for,omitempty"`
}

// Reveal returns the secrets as JSON, in the clear: for a file or a socket of
// mode 0600 and for nothing else.
func (s Secrets) Reveal() ([]byte, error) {
	return json.Marshal(revealed{string(s.AnthropicKey), string(s.AnthropicAuthToken), s.AnthropicBaseURL,
		string(s.GitHubToken), s.GitHubServer, string(s.E2BKey), s.E2B, string(s.OpenAIKey), s.OpenAIBaseURL,
		s.Store.KeyID, string(s.Store.Secret), string(s.Store.Session), s.Store.For})
}

// ParseSecrets reads what Reveal wrote. An error does not quote the data.
func ParseSecrets(data []byte) (Secrets, error) {
	var r revealed
	if err := json.Unmarshal(data, &r); err != nil {
		return Secrets{}, fault.New(op, fault.Invalid, "the stored credentials cannot be read")
	}
	return Secrets{
		AnthropicKey: Secret(r.AnthropicKey), AnthropicAuthToken: Secret(r.AnthropicAuthToken), AnthropicBaseURL: r.AnthropicBaseURL,
		OpenAIKey: Secret(r.OpenAIKey), OpenAIBaseURL: r.OpenAIBaseURL,
		GitHubToken: Secret(r.GitHubToken), GitHubServer: r.GitHubServer, E2BKey: Secret(r.E2BKey), E2B: r.E2B,
		Store: Store{r.StoreKeyID, Secret(r.StoreSecret), Secret(r.StoreSession), r.StoreFor},
	}, nil
}

// The methods below hide the addresses too, which may say more than they
// should.

// String names what is set.
func (s Secrets) String() string {
	return fmt.Sprintf("{anthropic key %s, anthropic token %s, openai key %s, github token %s, e2b key %s, artifact store %s}",
		s.AnthropicKey, s.AnthropicAuthToken, s.OpenAIKey, s.GitHubToken, s.E2BKey, s.Store.Secret)
}

// GoString returns the same as String.
func (s Secrets) GoString() string { return s.String() }

// LogValue returns the same as String.
func (s Secrets) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalJSON writes the same as String; see Reveal.
func (s Secrets) MarshalJSON() ([]byte, error) { return json.Marshal(s.String()) }

// UnmarshalJSON fails; see [ParseSecrets].
func (s *Secrets) UnmarshalJSON([]byte) error {
	return errors.New("secrets are read by ParseSecrets only")
}
