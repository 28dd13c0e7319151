package payload

import (
	"bytes"
	"encoding/base64"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	commonpb "go.temporal.io/api/common/v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// key is the text of a key of one repeated byte.
func key(id string, b byte) string {
	return id + ":" + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{b}, 32))
}

func parse(t *testing.T, text string) *Keys {
	t.Helper()
	k, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func seal(t *testing.T, k *Keys, value any) *commonpb.Payload {
	t.Helper()
	p, err := k.Converter().ToPayload(value)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestASealedPayloadIsUnreadableAndComesBack(t *testing.T) {
	k := parse(t, key("a", 1))
	p := seal(t, k, "the prompt")
	if strings.Contains(p.String(), "prompt") {
		t.Errorf("it can be read: %s", p)
	}
	if again := seal(t, k, "the prompt"); bytes.Equal(p.Data, again.Data) {
		t.Error("the same text is sealed the same way twice")
	}
	var back string
	if err := k.Converter().FromPayload(p, &back); err != nil || back != "the prompt" {
		t.Errorf("%q, %v", back, err)
	}
}

func TestARotatedKeyStillOpensWhatItSealed(t *testing.T) {
	old := seal(t, parse(t, key("a", 1)), "old")
	k := parse(t, key("b", 2)+", "+key("a", 1))
	var back string
	if err := k.Converter().FromPayload(old, &back); err != nil || back != "old" {
		t.Errorf("%q, %v", back, err)
	}
	if p := seal(t, k, "new"); string(p.Metadata[keyIDKey]) != "b" {
		t.Errorf("sealed with %q", p.Metadata[keyIDKey])
	}
}

func TestWhatWasNeverSealedIsPassedOn(t *testing.T) {
	var none *Keys
	var back string
	if err := parse(t, key("a", 1)).Converter().FromPayload(seal(t, none, "older than the key"), &back); err != nil || back != "older than the key" {
		t.Errorf("%q, %v", back, err)
	}
}

func TestWithoutAKeyASealedPayloadNamesTheSetting(t *testing.T) {
	var none *Keys
	var back string
	err := none.Converter().FromPayload(seal(t, parse(t, key("a", 1)), "x"), &back)
	if fault.KindOf(err) != fault.Denied || !strings.Contains(err.Error(), Variable) {
		t.Errorf("%q, %v", back, err)
	}
	if err := none.Converter().FromPayload(seal(t, none, "x"), &back); err != nil || back != "x" {
		t.Errorf("%q, %v", back, err)
	}
}

func TestAPayloadThatIsNotOursIsRefused(t *testing.T) {
	p := seal(t, parse(t, key("a", 1)), "x")
	for name, other := range map[string]string{"another key of that id": key("a", 2), "no such id": key("b", 1)} {
		if _, err := parse(t, other).Decode([]*commonpb.Payload{p}); fault.KindOf(err) != fault.Denied {
			t.Errorf("%s: %v", name, err)
		}
	}
	p.Data[len(p.Data)-1] ^= 1
	if _, err := parse(t, key("a", 1)).Decode([]*commonpb.Payload{p}); fault.KindOf(err) != fault.Denied {
		t.Errorf("a changed one: %v", err)
	}
}

func TestABadKeyIsNamedAndNotShown(t *testing.T) {
	for _, bad := range []string{"c2VjcmV0", "a:c2VjcmV0", ":" + key("", 1), key("a", 1) + "," + key("a", 2)} {
		_, err := Parse(bad)
		if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), Variable) || strings.Contains(err.Error(), "c2VjcmV0") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestErrorsAreSealedToo(t *testing.T) {
	k := parse(t, key("a", 1))
	f := k.FailureConverter().ErrorToFailure(fault.New("", fault.Internal, "the prompt"))
	if strings.Contains(f.String(), "the prompt") {
		t.Errorf("it can be read: %s", f)
	}
	if err := k.FailureConverter().FailureToError(f); !strings.Contains(err.Error(), "the prompt") {
		t.Errorf("it does not come back: %v", err)
	}
}

func TestTheCodecEndpointServesTheWebPageOnly(t *testing.T) {
	const page = "http://127.0.0.1:8080"
	k := parse(t, key("a", 1))
	srv := httptest.NewServer(k.Handler(page))
	defer srv.Close()
	sealed := seal(t, k, "the prompt")
	body, err := protojson.Marshal(&commonpb.Payloads{Payloads: []*commonpb.Payload{sealed}})
	if err != nil {
		t.Fatal(err)
	}
	type answer struct {
		status int
		header http.Header
		text   string
	}
	ask := func(method, path, origin, host string) answer {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, srv.URL+path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Origin", origin)
		if host != "" {
			req.Host = host
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		var b bytes.Buffer
		_, _ = b.ReadFrom(res.Body)
		return answer{res.StatusCode, res.Header, b.String()}
	}
	res := ask(http.MethodPost, k.Path()+"/decode", page, "")
	var got commonpb.Payloads
	if err := protojson.Unmarshal([]byte(res.text), &got); err != nil || res.header.Get("Access-Control-Allow-Origin") != page {
		t.Fatalf("%d, %q, %v", res.status, res.text, err)
	}
	var none *Keys
	if diff := cmp.Diff([]*commonpb.Payload{seal(t, none, "the prompt")}, got.Payloads, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if res := ask(http.MethodOptions, k.Path()+"/decode", page, ""); res.status != http.StatusNoContent {
		t.Errorf("preflight: %d", res.status)
	}
	for _, bad := range [][3]string{
		{k.Path() + "/decode", "http://evil.example", ""}, {k.Path() + "/decode", "", ""},
		{k.Path() + "/decode", page, "evil.example:8080"}, {"/decode", page, ""}, {"/0000/decode", page, ""},
	} {
		if res := ask(http.MethodPost, bad[0], bad[1], bad[2]); res.status < 400 || strings.Contains(res.text, "payloads") {
			t.Errorf("%q: %d", bad, res.status)
		}
	}
}
