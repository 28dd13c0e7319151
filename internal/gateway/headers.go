package gateway

import (
	"bytes"
	"net/http"
	"slices"
	"strings"
)

// What an agent may say to the API, and the API to an agent. Everything else
// stays here: credentials and cookies of either side, what describes one hop,
// and what would make a proxy or this program's transport act, such as
// Idempotency-Key, which has Go repeat a POST.
var (
	requestHeaders   = []string{"Accept", "User-Agent", "X-App", "X-Client-Request-Id", "X-Claude-Code-Session-Id", "Originator", "Session-Id", "Thread-Id"}
	requestPrefixes  = []string{"Anthropic-", "X-Stainless-", "X-Claude-", "Openai-Beta", "X-Codex-"}
	responseHeaders  = []string{"Content-Type", "Content-Encoding", "Cache-Control", "Date", "Request-Id", "X-Request-Id", "Retry-After", "Retry-After-Ms", "X-Should-Retry"}
	responsePrefixes = []string{"Anthropic-", "Openai-", "X-Ratelimit-"}
	responseSecrets  = []string{"Anthropic-Organization-Id", "Openai-Organization", "Openai-Project"}
)

func allowed(key string, names, prefixes []string) bool {
	return slices.Contains(names, key) ||
		slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(key, p) })
}

// requestHeader makes the header that goes upstream.
func requestHeader(from http.Header, cred Credentials) http.Header {
	to := make(http.Header, len(from)+4)
	for key, values := range from {
		if allowed(key, requestHeaders, requestPrefixes) {
			to[key] = values
		}
	}
	// The answer has to be read here, so it may not be compressed.
	to.Set("Accept-Encoding", "identity")
	if cred.AuthToken != "" {
		to.Set("Authorization", "Bearer "+cred.AuthToken)
	} else {
		to.Set("X-Api-Key", cred.APIKey)
	}
	return to
}

// responseHeader copies what the agent may know.
func responseHeader(to, from http.Header, cred Credentials) {
	for key, values := range from {
		if !allowed(key, responseHeaders, responsePrefixes) || slices.Contains(responseSecrets, key) {
			continue
		}
		if slices.ContainsFunc(values, func(v string) bool { return cred.within([]byte(v)) }) {
			continue
		}
		to[key] = slices.Clone(values)
	}
}

// secrets lists what nobody may see.
func (c Credentials) secrets() []string {
	return slices.DeleteFunc([]string{c.APIKey, c.AuthToken, c.OpenAIKey}, func(s string) bool { return s == "" })
}

func (c Credentials) within(b []byte) bool {
	return slices.ContainsFunc(c.secrets(), func(s string) bool { return bytes.Contains(b, []byte(s)) })
}

// redact replaces the key where a server or a library repeats it.
func (c Credentials) redact(text string) string {
	for _, s := range c.secrets() {
		text = strings.ReplaceAll(text, s, "[key]")
	}
	return text
}

// bearer returns the tokens that a request carries.
func bearer(h http.Header) []string {
	list := make([]string, 0, 2)
	if k := h.Get("X-Api-Key"); k != "" {
		list = append(list, k)
	}
	if t, ok := strings.CutPrefix(h.Get("Authorization"), "Bearer "); ok && t != "" {
		list = append(list, t)
	}
	return list
}
