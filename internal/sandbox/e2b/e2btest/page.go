package e2btest

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// mostOnPage is how many a list shows at once.
const mostOnPage = 100

// paged cuts the page that is asked for out of a sorted list, and says in a
// header where the next one begins. A token names the place of the last one
// that was shown, not that one: it may be gone meanwhile. The places of a list
// that runs backwards fall.
func paged[T any](w http.ResponseWriter, q url.Values, all []T, backwards bool, place func(T) string) ([]T, bool) {
	limit := mostOnPage
	if text := q.Get("limit"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > mostOnPage {
			fail(w, http.StatusBadRequest, fmt.Sprintf("limit must be between 1 and %d", mostOnPage))
			return nil, false
		}
		limit = n
	}
	if token := q.Get("nextToken"); token != "" {
		last, err := base64.RawURLEncoding.DecodeString(token)
		if err != nil {
			fail(w, http.StatusBadRequest, "Invalid next token")
			return nil, false
		}
		from := slices.IndexFunc(all, func(x T) bool {
			if backwards {
				return place(x) < string(last)
			}
			return place(x) > string(last)
		})
		if from < 0 {
			from = len(all)
		}
		all = all[from:]
	}
	page := all[:min(limit, len(all))]
	if len(page) < len(all) {
		w.Header().Set("X-Next-Token", base64.RawURLEncoding.EncodeToString([]byte(place(page[limit-1]))))
	}
	return page, true
}

// place is where something stands in a list that is sorted by time.
func place(t time.Time, id string) string { return fmt.Sprintf("%019d %s", t.UnixNano(), id) }

// filters reads the metadata that a list is asked for: k=v&k2=v2, encoded as
// a whole, with each key and value encoded before that.
func filters(text string) (map[string]string, error) {
	if text == "" {
		return nil, nil
	}
	text, err := url.QueryUnescape(text)
	if err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	want := map[string]string{}
	for pair := range strings.SplitSeq(text, "&") {
		k, v, ok := strings.Cut(pair, "=")
		if !ok || strings.Contains(v, "=") {
			return nil, fmt.Errorf("metadata: %q is not one key and one value", pair)
		}
		if k, err = url.QueryUnescape(k); err == nil {
			v, err = url.QueryUnescape(v)
		}
		if err != nil {
			return nil, fmt.Errorf("metadata: %w", err)
		}
		want[k] = v
	}
	return want, nil
}

func has(have, want map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

func (s *Server) snapshotDir() string {
	return filepath.Join(s.dir, "snapshots", randomID("", 8))
}

// remove takes a folder away that nobody uses any more; what stays is seen
// by Close.
func remove(dir string) { _ = os.RemoveAll(dir) }
