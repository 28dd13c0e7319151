// Package s3test is a server that speaks S3, for tests of what keeps things in
// one. It keeps objects in memory and checks signatures, as the real ones do.
package s3test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
)

// Bucket is the bucket that a server has.
const Bucket = "artifacts"

// The keys that a server takes.
const (
	KeyID  = "AKIASTANDINSTANDIN00"
	Secret = "standin/secret/of/the/standin/0123456789"
)

// A Server answers over TCP until Close.
type Server struct {
	http *httptest.Server

	mu      sync.Mutex
	fault   func(*http.Request) Fault
	asked   map[string]int // requests, by method
	uploads map[string]bool
	signed  map[string]bool
}

// A Fault is what goes wrong with a request. The zero value is nothing.
type Fault struct {
	Status  int // an answer in place of the server's own
	Code    string
	Message string
	Header  http.Header
	Cut     bool // the connection is closed without an answer
}

// Start starts a server.
func Start() (*Server, error) {
	backend := s3mem.New()
	if err := backend.CreateBucket(Bucket); err != nil {
		return nil, err
	}
	s := &Server{asked: map[string]int{}, uploads: map[string]bool{}, signed: map[string]bool{}}
	s.http = httptest.NewServer(s.guard(gofakes3.New(backend, gofakes3.WithoutVersioning()).Server()))
	return s, nil
}

// Close ends it, and every connection.
func (s *Server) Close() {
	s.http.CloseClientConnections()
	s.http.Close()
}

// URL is where it answers.
func (s *Server) URL() string { return s.http.URL }

// Place is the store in a folder of the bucket, which may be empty, as
// artifact.Open and SANDBOX_TEMPORAL_ARTIFACTS take it.
func (s *Server) Place(folder string) string {
	return "s3://" + strings.TrimSuffix(Bucket+"/"+folder, "/") + "?endpoint=" + url.QueryEscape(s.URL())
}

// Fail has fault asked about every request from now on; nil: none fails.
func (s *Server) Fail(fault func(*http.Request) Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = fault
}

// Asked returns how many requests came with a method.
func (s *Server) Asked(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked[method]
}

// Unfinished returns how many uploads in parts were begun and neither ended
// nor given up: they cost money, and no listing of objects shows them.
func (s *Server) Unfinished() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.uploads)
}

// Signed reports whether any request had a header in its signature.
func (s *Server) Signed(header string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.signed[strings.ToLower(header)]
}

// guard stands before the server.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.asked[r.Method]++
		ask := s.fault
		s.mu.Unlock()
		if ask != nil {
			switch f := ask(r); {
			case f.Cut:
				panic(http.ErrAbortHandler)
			case f.Status != 0:
				for name, values := range f.Header {
					w.Header()[name] = values
				}
				refuse(w, r, f.Status, f.Code, f.Message)
				return
			}
		}
		if status, code, message := s.judge(r); status != 0 {
			refuse(w, r, status, code, message)
			return
		}
		query := r.URL.Query()
		next.ServeHTTP(&watched{w, s, query}, r)
		if id := query.Get("uploadId"); id != "" && (r.Method == http.MethodPost || r.Method == http.MethodDelete) {
			s.mu.Lock()
			delete(s.uploads, id)
			s.mu.Unlock()
		}
	})
}

// watched sees the id of an upload that is begun.
type watched struct {
	http.ResponseWriter
	s     *Server
	query url.Values
}

func (w *watched) Write(p []byte) (int, error) {
	if w.query.Has("uploads") {
		var begun struct{ UploadId string } //nolint:staticcheck // the protocol's own name
		if xml.Unmarshal(p, &begun) == nil && begun.UploadId != "" {
			w.s.mu.Lock()
			w.s.uploads[begun.UploadId] = true
			w.s.mu.Unlock()
		}
	}
	return w.ResponseWriter.Write(p)
}

func refuse(w http.ResponseWriter, r *http.Request, status int, code, message string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		fmt.Fprintf(w, "<Error><Code>%s</Code><Message>%s</Message></Error>", code, message)
	}
}

// judge looks at a signature of version 4, as Amazon's documentation
// "Authenticating Requests (AWS Signature Version 4)" describes it. Accept-
// Encoding is changed first, as the servers before Google's stores do.
func (s *Server) judge(r *http.Request) (status int, code, message string) {
	if v := r.Header.Get("Accept-Encoding"); v != "" {
		r.Header.Set("Accept-Encoding", v+",gzip(gfe)")
	}
	fields := map[string]string{}
	algorithm, rest, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	for part := range strings.SplitSeq(rest, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		fields[name] = value
	}
	scope := strings.Split(fields["Credential"], "/")
	if algorithm != "AWS4-HMAC-SHA256" || len(scope) != 5 {
		return http.StatusForbidden, "AccessDenied", "Access Denied."
	}
	if scope[0] != KeyID {
		return http.StatusForbidden, "InvalidAccessKeyId", "The access key id you provided does not exist in our records."
	}
	names := strings.Split(fields["SignedHeaders"], ";")
	var headers strings.Builder
	s.mu.Lock()
	for _, name := range names {
		s.signed[name] = true
		value := strings.Join(r.Header.Values(name), ",")
		switch name {
		case "host":
			value = r.Host
		case "content-length":
			value = fmt.Sprint(r.ContentLength)
		}
		fmt.Fprintf(&headers, "%s:%s\n", name, strings.Join(strings.Fields(value), " "))
	}
	s.mu.Unlock()
	var query []string
	for name, values := range r.URL.Query() {
		for _, v := range values {
			query = append(query, escape(name)+"="+escape(v))
		}
	}
	slices.Sort(query)
	canonical := strings.Join([]string{r.Method, r.URL.EscapedPath(), strings.Join(query, "&"), headers.String(), fields["SignedHeaders"], r.Header.Get("X-Amz-Content-Sha256")}, "\n")
	sum := sha256.Sum256([]byte(canonical))
	toSign := strings.Join([]string{algorithm, r.Header.Get("X-Amz-Date"), strings.Join(scope[1:], "/"), hex.EncodeToString(sum[:])}, "\n")
	key := []byte("AWS4" + Secret)
	for _, part := range append(slices.Clone(scope[1:]), toSign) {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(part))
		key = mac.Sum(nil)
	}
	if !hmac.Equal([]byte(hex.EncodeToString(key)), []byte(fields["Signature"])) {
		return http.StatusForbidden, "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided."
	}
	return 0, "", ""
}

// escape is the encoding of URLs that signatures are made over.
func escape(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }
