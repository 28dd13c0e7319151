package artifact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact/s3test"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func server(t *testing.T) *s3test.Server {
	t.Helper()
	srv, err := s3test.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(srv.Close)
	return srv
}

func rightKeys() Keys { return Keys{ID: s3test.KeyID, Secret: s3test.Secret} }

// hasty tries again at once.
var hasty = WithPause(func(int) time.Duration { return 0 })

// onServer opens the store in a folder of the server's bucket.
func onServer(t *testing.T, srv *s3test.Server, folder string, options ...Option) *Store {
	t.Helper()
	s, err := Open(t.Context(), srv.Place(folder), append([]Option{WithKeys(rightKeys), hasty}, options...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if n := srv.Unfinished(); n > 0 {
			t.Errorf("%d uploads are unfinished", n)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestURLsOfBucketsSayWhatIsWrongWithThem(t *testing.T) {
	for name, value := range map[string]string{"AWS_REGION": "", "AWS_DEFAULT_REGION": "", "AWS_PROFILE": "", "AWS_ENDPOINT_URL": "",
		"AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent"} {
		t.Setenv(name, value)
	}
	for where, want := range map[string]string{ // a part of the hint; "": it opens
		"s3://bucket?region=eu-west-1":                            "",
		"s3://bucket/team-a/x?endpoint=http://127.0.0.1:1":        "",
		"s3://bucket/?prefix=team-a/&endpoint=http://127.0.0.1:1": "",
		"s3://bucket?endpoint=http://h:1&path_style=false":        "",
		"s3://bucket":                                   "?region=",
		"s3://":                                         "s3://bucket/folder",
		"s3://bucket:80":                                "s3://bucket/folder",
		"s3://bucket?regoin=x":                          "There are: region, endpoint",
		"s3://bucket?region=x&region=y":                 "There are: region, endpoint",
		"s3://bucket/a?prefix=b&region=x":               "say it once",
		"s3://bucket/../x?region=x":                     "letters, digits",
		"s3://bucket/a b?region=x":                      "letters, digits",
		"s3://bucket?endpoint=minio:9000":               "https://minio",
		"s3://bucket?endpoint=http://user:secret@minio": "https://minio",
		"s3://bucket?region=x&path_style=maybe":         "path_style=true",
		"s3://user:secret@bucket?region=x":              "without keys",
		"s3://secret:%zz@bucket":                        "without keys",
		"s3://bucket?profile=nobody":                    "AWS_PROFILE",
	} {
		s, err := Open(t.Context(), where)
		if want == "" {
			if err != nil {
				t.Errorf("%s: %v", where, err)
				continue
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			continue
		}
		if fault.KindOf(err) != fault.Invalid || !strings.Contains(fault.HintOf(err), want) {
			t.Errorf("%s: %v of kind %q, hint %q", where, err, fault.KindOf(err), fault.HintOf(err))
		}
		if err != nil && strings.Contains(err.Error()+fault.HintOf(err), "secret") {
			t.Errorf("%v shows a secret", err)
		}
	}
}

func TestInstallationsShareABucketByFolders(t *testing.T) {
	srv := server(t)
	whole, a, b := onServer(t, srv, ""), onServer(t, srv, "team-a"), onServer(t, srv, "team-ab")
	for _, s := range []*Store{a, b} {
		if err := s.Put(t.Context(), "runs/r/1/x", strings.NewReader("x")); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"runs/r/1/x"}, keys(t, a, "")); diff != "" {
		t.Error(diff)
	}
	if err := a.Delete(t.Context(), "runs"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"team-ab/runs/r/1/x"}, keys(t, whole, "")); diff != "" {
		t.Error(diff)
	}
	// The folder can be named in both ways.
	same, err := Open(t.Context(), srv.Place("")+"&prefix=team-ab/", WithKeys(rightKeys))
	if err != nil {
		t.Fatal(err)
	}
	defer same.Close()
	if diff := cmp.Diff([]string{"runs/r/1/x"}, keys(t, same, "")); diff != "" {
		t.Error(diff)
	}
}

func TestListsAndDeletesGoBeyondOnePage(t *testing.T) {
	onServers(t, func(t *testing.T, s *Store) {
		const n = 1005 // a server gives 1000 at a time
		var want []string
		for i := range n {
			want = append(want, fmt.Sprintf("runs/r/%04d", i))
		}
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				for i := w; i < n; i += 8 {
					if err := s.write(t.Context(), want[i], strings.NewReader("x"), false); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if diff := cmp.Diff(want, keys(t, s, "runs")); diff != "" {
			t.Error(diff)
		}
		if err := s.Delete(t.Context(), "runs/r"); err != nil {
			t.Fatal(err)
		}
		if left := keys(t, s, ""); len(left) > 0 {
			t.Errorf("%d are left", len(left))
		}
	})
}

// A segment of a log can have more chunks than a page: an agent that prints
// one letter at a time.
func TestALogOfManyTinyChunksIsWhole(t *testing.T) {
	onServers(t, func(t *testing.T, s *Store) {
		const n = 1100
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				for i := w; i < n; i += 8 {
					if err := s.write(t.Context(), chunk{int64(i), 1}.key(key), strings.NewReader("x"), false); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if got, size := read(t, s, 0); len(got) != n || size != n {
			t.Errorf("%d bytes of %d, want %d", len(got), size, n)
		}
		if err := s.Seal(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		if got := get(t, s, key); got != strings.Repeat("x", n) {
			t.Errorf("sealed %d bytes", len(got))
		}
	})
}

func TestLargeObjectsComeBackAsTheyWere(t *testing.T) {
	onServers(t, func(t *testing.T, s *Store) {
		text := bytes.Repeat([]byte("0123456789abcdef"), 20<<16) // 20 MiB: several parts
		if err := s.Put(t.Context(), "k", bytes.NewReader(text)); err != nil {
			t.Fatal(err)
		}
		if got := get(t, s, "k"); got != string(text) {
			t.Errorf("%d bytes came back", len(got))
		}
	})
}

func TestAnInterruptedUploadStoresNothing(t *testing.T) {
	for name, c := range map[string]struct {
		bytes int
		err   error
		want  fault.Kind
	}{
		"small, its source fails": {1 << 20, fault.New("far away", fault.Lost, "gone"), fault.Lost},
		"large, its source fails": {20 << 20, fault.New("far away", fault.Lost, "gone"), fault.Lost},
		"small, nobody waits":     {1 << 20, nil, fault.Cancelled},
		"large, nobody waits":     {20 << 20, nil, fault.Cancelled},
	} {
		t.Run(name, func(t *testing.T) {
			srv := server(t)
			s := onServer(t, srv, "")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			src := io.MultiReader(bytes.NewReader(make([]byte, c.bytes)), readerFunc(func([]byte) (int, error) {
				if c.err != nil {
					return 0, c.err
				}
				cancel()
				return 0, io.EOF
			}))
			wantKind(t, s.Put(ctx, "k", src), c.want)
			if parts := c.bytes > 16<<20; parts != (srv.Asked(http.MethodPost) > 0) || parts != (srv.Asked(http.MethodDelete) > 0) {
				t.Errorf("an upload in parts: begun and given up with %d and %d requests", srv.Asked(http.MethodPost), srv.Asked(http.MethodDelete))
			}
			if left := keys(t, s, ""); len(left) > 0 {
				t.Errorf("the store holds %q", left)
			}
		})
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// everything uses a store in every way there is.
func everything(ctx context.Context, s *Store) error {
	if err := s.Put(ctx, "runs/r/1/x", strings.NewReader("x")); err != nil {
		return err
	}
	if _, err := s.PutText(ctx, "text"); err != nil {
		return err
	}
	if err := s.Append(ctx, key, 0, []byte("hello")); err != nil {
		return err
	}
	r, _, err := s.ReadLog(ctx, key, 1)
	if err != nil {
		return err
	}
	got, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	if string(got) != "ello" {
		return fmt.Errorf("read %q", got)
	}
	if err := s.Seal(ctx, key); err != nil {
		return err
	}
	for _, err := range s.List(ctx, "runs") {
		if err != nil {
			return err
		}
	}
	return errors.Join(s.Try(ctx), s.Delete(ctx, "runs"))
}

func TestWhatPassesIsTriedAgain(t *testing.T) {
	for name, f := range map[string]s3test.Fault{
		"slow down":      {Status: 503, Code: "SlowDown", Message: "Please reduce your request rate."},
		"internal error": {Status: 500, Code: "InternalError"},
		"a dead proxy":   {Status: 502},
		"a cut line":     {Cut: true},
	} {
		t.Run(name, func(t *testing.T) {
			srv := server(t)
			s := onServer(t, srv, "")
			srv.Fail(func(r *http.Request) s3test.Fault {
				switch attempt, _, _ := strings.Cut(r.Header.Get("Amz-Sdk-Request"), ";"); attempt {
				case "attempt=1", "attempt=2":
					return f
				}
				return s3test.Fault{}
			})
			if err := everything(t.Context(), s); err != nil {
				t.Error(err)
			}
			// It ends, and says that it may go better later.
			srv.Fail(func(*http.Request) s3test.Fault { return f })
			_, err := s.Get(t.Context(), "k")
			wantKind(t, err, fault.Unavailable)
			if fault.HintOf(err) == "" {
				t.Errorf("%v has no hint", err)
			}
		})
	}
}

func TestWhatAServerRefusesIsNamed(t *testing.T) {
	for name, c := range map[string]struct {
		fault s3test.Fault
		keys  Keys
		kind  fault.Kind
		hint  string
	}{
		"unknown key":         {keys: Keys{ID: "AKIANOBODY", Secret: s3test.Secret}, kind: fault.Denied, hint: "AWS_ACCESS_KEY_ID"},
		"wrong secret":        {keys: Keys{ID: s3test.KeyID, Secret: "not-the-secret"}, kind: fault.Denied, hint: "AWS_SECRET_ACCESS_KEY"},
		"no right":            {fault: s3test.Fault{Status: 403, Code: "AccessDenied"}, kind: fault.Denied, hint: "AWS_PROFILE"},
		"key that has ended":  {fault: s3test.Fault{Status: 400, Code: "ExpiredToken"}, kind: fault.Denied, hint: "AWS_SESSION_TOKEN"},
		"clock":               {fault: s3test.Fault{Status: 403, Code: "RequestTimeTooSkewed"}, kind: fault.Denied, hint: "clock"},
		"bucket not there":    {fault: s3test.Fault{Status: 404, Code: "NoSuchBucket"}, kind: fault.Invalid, hint: "SANDBOX_TEMPORAL_ARTIFACTS"},
		"bucket elsewhere":    {fault: s3test.Fault{Status: 301, Code: "PermanentRedirect"}, kind: fault.Invalid, hint: "region"},
		"signed for elsewere": {fault: s3test.Fault{Status: 400, Code: "AuthorizationHeaderMalformed"}, kind: fault.Invalid, hint: "region"},
	} {
		t.Run(name, func(t *testing.T) {
			srv := server(t)
			if c.keys == (Keys{}) {
				c.keys = rightKeys()
			}
			s := onServer(t, srv, "", WithKeys(func() Keys { return c.keys }))
			if c.fault.Status != 0 {
				srv.Fail(func(*http.Request) s3test.Fault { return c.fault })
			}
			_, get := s.Get(t.Context(), "k")
			var list error
			for _, err := range s.List(t.Context(), "") {
				list = err
			}
			asked := srv.Asked(http.MethodGet)
			for _, err := range []error{s.Put(t.Context(), "k", strings.NewReader("x")), get, list, s.Try(t.Context())} {
				if fault.KindOf(err) != c.kind || !strings.Contains(fault.HintOf(err), c.hint) {
					t.Errorf("%v of kind %q, hint %q; want %q, %q", err, fault.KindOf(err), fault.HintOf(err), c.kind, c.hint)
				}
				if err != nil && strings.Contains(err.Error()+fault.HintOf(err), c.keys.Secret) {
					t.Errorf("%v shows the secret", err)
				}
			}
			if asked != 2 {
				t.Errorf("asked %d times for what will not change", asked)
			}
		})
	}
}

func TestABucketThatIsNotThereIsSaid(t *testing.T) {
	srv := server(t)
	s, err := Open(t.Context(), strings.Replace(srv.Place(""), s3test.Bucket, "nowhere", 1), WithKeys(rightKeys), hasty)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, get := s.Get(t.Context(), "k")
	_, _, log := s.ReadLog(t.Context(), key, 0)
	for _, err := range []error{get, log, s.Put(t.Context(), "k", strings.NewReader("x")), s.Append(t.Context(), key, 0, []byte("x")), s.Try(t.Context())} {
		if fault.KindOf(err) != fault.Invalid || !strings.Contains(fault.HintOf(err), "SANDBOX_TEMPORAL_ARTIFACTS") {
			t.Errorf("%v of kind %q, hint %q", err, fault.KindOf(err), fault.HintOf(err))
		}
	}
}

func TestAServerThatIsNotThereIsSaid(t *testing.T) {
	srv := server(t)
	s := onServer(t, srv, "")
	srv.Close()
	err := s.Put(t.Context(), "k", strings.NewReader("x"))
	wantKind(t, err, fault.Unavailable)
	if !strings.Contains(fault.HintOf(err), "reach it") || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("%v (%s)", err, fault.HintOf(err))
	}
}

// The id of a request is random and stands in the text of an error; gocloud.dev
// v0.46 takes "301" in it for a bucket that is not there. A log would then seem
// not to be sealed, or not to have begun.
func TestTheIdOfARequestIsNotTakenForItsStatus(t *testing.T) {
	srv := server(t)
	s := onServer(t, srv, "")
	srv.Fail(func(*http.Request) s3test.Fault {
		return s3test.Fault{Status: 503, Code: "SlowDown", Header: http.Header{"X-Amz-Request-Id": {"4F301A"}, "X-Amz-Id-2": {"301"}}}
	})
	_, err := s.Sealed(t.Context(), key)
	wantKind(t, err, fault.Unavailable)
	_, err = s.Get(t.Context(), key)
	wantKind(t, err, fault.Unavailable)
	wantKind(t, s.Append(t.Context(), key, 0, []byte("x")), fault.Unavailable)
	wantKind(t, s.Delete(t.Context(), key), fault.Unavailable)
}

func TestNobodyWaitsForAServerAfterItIsCancelled(t *testing.T) {
	srv := server(t)
	s := onServer(t, srv, "")
	ctx, cancel := context.WithCancel(t.Context())
	srv.Fail(func(*http.Request) s3test.Fault {
		cancel()
		return s3test.Fault{Status: 503, Code: "SlowDown"}
	})
	wantKind(t, s.Append(ctx, key, 0, []byte("x")), fault.Cancelled)
	wantKind(t, s.Put(ctx, "k", strings.NewReader("x")), fault.Cancelled)
	_, err := s.Get(ctx, "k")
	wantKind(t, err, fault.Cancelled)
}

// Google's servers change Accept-Encoding before they check a signature; the
// stand-in does so too.
func TestWhatServersChangeIsNotSigned(t *testing.T) {
	srv := server(t)
	if err := everything(t.Context(), onServer(t, srv, "")); err != nil {
		t.Fatal(err)
	}
	if srv.Signed("Accept-Encoding") || !srv.Signed("Host") {
		t.Error("Accept-Encoding is signed, or nothing is")
	}
}

func TestNewKeysAreUsedAtOnce(t *testing.T) {
	srv := server(t)
	lent := Keys{ID: "AKIAOLD", Secret: "old"}
	s := onServer(t, srv, "", WithKeys(func() Keys { return lent }))
	wantKind(t, s.Try(t.Context()), fault.Denied)
	lent = rightKeys()
	if err := s.Try(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestKeysComeFromTheEnvironmentAndTheFilesOfTheCLI(t *testing.T) {
	srv := server(t)
	dir := t.TempDir()
	for name, value := range map[string]string{"HOME": dir, "AWS_EC2_METADATA_DISABLED": "true", "AWS_PROFILE": "", "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "",
		"AWS_SESSION_TOKEN": "", "AWS_CONFIG_FILE": dir + "/config", "AWS_SHARED_CREDENTIALS_FILE": dir + "/credentials"} {
		t.Setenv(name, value)
	}
	try := func(where string) error {
		s, err := Open(t.Context(), where, WithKeys(func() Keys { return Keys{} }))
		if err != nil {
			return err
		}
		defer s.Close()
		return s.Try(t.Context())
	}
	err := try(srv.Place(""))
	if fault.KindOf(err) != fault.Denied || !strings.Contains(fault.HintOf(err), "AWS_ACCESS_KEY_ID") {
		t.Errorf("without keys: %v of kind %q, hint %q", err, fault.KindOf(err), fault.HintOf(err))
	}
	writeFile(t, dir+"/credentials", fmt.Sprintf("[team]\naws_access_key_id = %s\naws_secret_access_key = %s\n", s3test.KeyID, s3test.Secret))
	if err := try(srv.Place("") + "&profile=team"); err != nil {
		t.Errorf("with a profile: %v", err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", s3test.KeyID)
	t.Setenv("AWS_SECRET_ACCESS_KEY", s3test.Secret)
	if err := try(srv.Place("")); err != nil {
		t.Errorf("with the environment: %v", err)
	}
}

// A transcript has thousands of chunks, and a worker has a minute to seal it.
func TestChunksOnAServerAreReadAhead(t *testing.T) {
	srv := server(t)
	s := onServer(t, srv, "")
	for i := range 2 * atOnce {
		add(t, s, int64(i), "x")
	}
	var came atomic.Int64
	all := make(chan struct{})
	srv.Fail(func(r *http.Request) s3test.Fault {
		if r.Method != http.MethodGet || r.URL.Query().Has("list-type") || !strings.Contains(r.URL.Path, chunks) {
			return s3test.Fault{}
		}
		if came.Add(1) == atOnce {
			close(all)
		}
		select { // nobody is answered before all have asked
		case <-all:
			return s3test.Fault{}
		case <-r.Context().Done():
		case <-time.After(20 * time.Second):
			t.Errorf("%d chunks were asked for at once", came.Load())
		}
		return s3test.Fault{Status: http.StatusForbidden, Code: "AccessDenied"}
	})
	if err := s.Seal(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if got := get(t, s, key); got != strings.Repeat("x", 2*atOnce) {
		t.Errorf("sealed %q", got)
	}
}

func TestWhoStopsReadingALogLeavesNothingBehind(t *testing.T) {
	srv := server(t)
	s := onServer(t, srv, "")
	for i := range 2 * atOnce {
		add(t, s, int64(i), "x")
	}
	r, _, err := s.ReadLog(t.Context(), key, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	asked := srv.Asked(http.MethodGet)
	if _, err := r.Read(make([]byte, 1)); err == nil {
		t.Error("a closed reader reads on")
	}
	if n := srv.Asked(http.MethodGet); n != asked {
		t.Errorf("%d requests came after the reader was closed", n-asked)
	}
}
