package e2btest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"net/url"
	"slices"
	"testing"
)

func FuzzFrames(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x00\x02{}"))
	f.Add([]byte("\x02\x00\x00\x00\x10{\"error\":{}}"))
	f.Add([]byte("\x01\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var in json.RawMessage
		end, err := readFrame(bytes.NewReader(b), &in)
		if err == nil && !end && !json.Valid(in) {
			t.Errorf("%q was read as %q", b, in)
		}
	})
}

// Whoever encodes as E2B wants it is understood, whatever the words.
func FuzzFilters(f *testing.F) {
	f.Add("run", "a b/c.d")
	f.Add("k=&%", "+1 %20&=")
	f.Add("", "")
	f.Fuzz(func(t *testing.T, k, v string) {
		if _, err := filters(k); err != nil {
			t.Logf("%q: %v", k, err) // and does no harm
		}
		got, err := filters(url.QueryEscape(url.QueryEscape(k) + "=" + url.QueryEscape(v)))
		if err != nil || len(got) != 1 || got[k] != v {
			t.Errorf("%q=%q came back as %q, %v", k, v, got, err)
		}
	})
}

func FuzzPages(f *testing.F) {
	f.Add("100", "", uint8(250))
	f.Add("1", "MDA", uint8(3))
	f.Fuzz(func(t *testing.T, limit, token string, n uint8) {
		all := make([]string, n)
		for i := range all {
			all[i] = fmt.Sprintf("%03d", i)
		}
		q := url.Values{"limit": {limit}, "nextToken": {token}}
		var got []string
		for {
			w := httptest.NewRecorder()
			page, ok := paged(w, q, all, false, func(s string) string { return s })
			if !ok {
				return
			}
			got = append(got, page...)
			next := w.Header().Get("X-Next-Token")
			if next == "" {
				break
			}
			q.Set("nextToken", next)
		}
		// From wherever it began, each one came once and in order.
		if !slices.Equal(got, all[len(all)-len(got):]) {
			t.Errorf("%d came of %d: %v", len(got), len(all), got)
		}
	})
}
