package deploy_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// An authority signs certificates for a test.
type authority struct {
	t    *testing.T
	dir  string
	name string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// newAuthority writes its own certificate to NAME.pem.
func newAuthority(t *testing.T, dir, name string) *authority {
	t.Helper()
	a := &authority{t: t, dir: dir, name: name}
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	a.key = a.sign(name, a.cert)
	b, err := os.ReadFile(filepath.Join(dir, name+".pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	if a.cert, err = x509.ParseCertificate(block.Bytes); err != nil {
		t.Fatal(err)
	}
	return a
}

// sign writes FILE.pem and FILE.key. Without a key of the authority the
// certificate signs itself.
func (a *authority) sign(file string, what *x509.Certificate) *ecdsa.PrivateKey {
	t := a.t
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer := a.key
	if signer == nil {
		signer = key
	}
	der, err := x509.CreateCertificate(rand.Reader, what, a.cert, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{file + ".pem": {Type: "CERTIFICATE", Bytes: der}, file + ".key": {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(filepath.Join(a.dir, name), pem.EncodeToMemory(block), 0o644); err != nil { // of every user of the test
			t.Fatal(err)
		}
	}
	return key
}

// leaf signs a certificate for a server of this host or for a client, good
// until the time.
func (a *authority) leaf(file string, until time.Time) {
	a.t.Helper()
	a.sign(file, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: file}, NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: until,
		DNSNames: []string{"temporal.test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
}

// secureCluster starts a Temporal server that has a certificate of the
// authority in certs, and what is set besides. Its own workers have a door of
// their own, which asks for no key.
func (top *topology) secureCluster(certs string, besides ...string) {
	home, inner := top.home("temporal", temporalUser), ports(top.t, 3)
	at := func(name string) string { return filepath.Join(certs, name) }
	env := []string{"DB=sqlite", "DBNAME=" + filepath.Join(home, "temporal.db"), "VISIBILITY_DBNAME=" + filepath.Join(home, "visibility.db"),
		"BIND_ON_IP=127.0.0.1", "TEMPORAL_BROADCAST_ADDRESS=127.0.0.1", "LOG_LEVEL=error", "DYNAMIC_CONFIG_FILE_PATH=" + filepath.Join(top.dir, "etc", "dynamic.yaml"),
		"TEMPORAL_TLS_SERVER_CA_CERT=" + at("ours.pem"), "TEMPORAL_TLS_SERVER_CERT=" + at("server.pem"), "TEMPORAL_TLS_SERVER_KEY=" + at("server.key"),
		"TEMPORAL_TLS_FRONTEND_CERT=" + at("server.pem"), "TEMPORAL_TLS_FRONTEND_KEY=" + at("server.key"),
		"USE_INTERNAL_FRONTEND=true", "INTERNAL_FRONTEND_GRPC_PORT=" + inner[0], "INTERNAL_FRONTEND_HTTP_PORT=" + inner[1], "INTERNAL_FRONTEND_MEMBERSHIP_PORT=" + inner[2],
		"TEMPORAL_TLS_INTERNODE_SERVER_NAME=temporal.test", "TEMPORAL_TLS_FRONTEND_SERVER_NAME=temporal.test"}
	more, frontend := clusterPorts(top.t)
	top.temporal = "127.0.0.1:" + frontend
	env = append(append(env, more...), besides...)
	top.start("temporal", top.as(context.Background(), temporalUser, home, env, "temporal-server", "--allow-no-auth", "start",
		"--service=frontend", "--service=internal-frontend", "--service=history", "--service=matching", "--service=worker"))
}

// teller returns what runs the program as a person of top's: its exit status,
// and what it says. Of the variables those that name files name them in certs.
func (top *topology) teller(certs string) func(env map[string]string, args ...string) (code int, said string) {
	t, person := top.t, top.home("person", personUser)
	return func(env map[string]string, args ...string) (int, string) {
		vars := []string{"TEMPORAL_ADDRESS=" + top.temporal, "SANDBOX_TEMPORAL_HOME=" + filepath.Join(person, "state"), "NO_COLOR=1"}
		for name, value := range env {
			if strings.HasPrefix(name, "TEMPORAL_TLS_") && name != "TEMPORAL_TLS_SERVER_NAME" {
				value = filepath.Join(certs, value)
			}
			vars = append(vars, name+"="+value)
		}
		var out bytes.Buffer
		cmd := top.as(t.Context(), personUser, person, vars, append([]string{"sandbox-temporal"}, args...)...)
		cmd.Stdout, cmd.Stderr = &out, &out
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), out.String()
	}
}

// changed is env with other values; an empty one takes a variable away.
func changed(env, other map[string]string) map[string]string {
	env = maps.Clone(env)
	for name, value := range other {
		if env[name] = value; value == "" {
			delete(env, name)
		}
	}
	return env
}

// A claimant makes keys in the form that Temporal's own authoriser reads: JSON
// web tokens (RFC 7519) with the permissions in them, signed with ES256.
type claimant struct {
	t   *testing.T
	key *ecdsa.PrivateKey
}

func newClaimant(t *testing.T) *claimant {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &claimant{t, key}
}

// serve shows the public part of the key as a JSON web key set (RFC 7517), and
// returns the URL.
func (c *claimant) serve() string {
	c.t.Helper()
	point, err := c.key.PublicKey.Bytes() // 4, then both coordinates
	if err != nil {
		c.t.Fatal(err)
	}
	set, err := json.Marshal(map[string]any{"keys": []map[string]string{{
		"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": "test", "x": part(point[1:33]), "y": part(point[33:]),
	}}})
	if err != nil {
		c.t.Fatal(err)
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(set)
	}))
	c.t.Cleanup(srv.Close)
	return srv.URL
}

func part(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// token is a key with the permissions, good until the time.
func (c *claimant) token(until time.Time, permissions ...string) string {
	c.t.Helper()
	claims, err := json.Marshal(map[string]any{"sub": "tester", "exp": until.Unix(), "permissions": permissions})
	if err != nil {
		c.t.Fatal(err)
	}
	text := part([]byte(`{"alg":"ES256","kid":"test","typ":"JWT"}`)) + "." + part(claims)
	sum := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, c.key, sum[:])
	if err != nil {
		c.t.Fatal(err)
	}
	return text + "." + part(append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...))
}

func TestAClusterThatWantsAnAPIKey(t *testing.T) {
	top := newTopology(t)
	certs := filepath.Join(top.dir, "certs")
	if err := os.Mkdir(certs, 0o755); err != nil {
		t.Fatal(err)
	}
	soon := time.Now().Add(time.Hour)
	newAuthority(t, certs, "ours").leaf("server", soon)
	keys, others := newClaimant(t), newClaimant(t)
	top.secureCluster(certs, "TEMPORAL_JWT_KEY_SOURCE1="+keys.serve(), "TEMPORAL_AUTH_AUTHORIZER=default", "TEMPORAL_AUTH_CLAIM_MAPPER=default")
	say := top.teller(certs)
	all := keys.token(soon, "temporal-system:admin", "default:admin")
	good := map[string]string{"TEMPORAL_TLS_CA": "ours.pem", "TEMPORAL_API_KEY": all}
	top.until("namespace create", 2*time.Minute, func() error {
		if code, said := say(good, "namespace", "create"); code != 0 {
			return fmt.Errorf("%d: %s", code, said)
		}
		return nil
	})

	const denied = 4
	for _, c := range []struct {
		name string
		key  string
		code int
		says string
	}{
		{"a key that may everything", all, 0, "no run yet"},
		{"no key", "", denied, "TEMPORAL_API_KEY"},
		{"a key that is none", "0123456789abcdef", denied, "TEMPORAL_API_KEY"},
		{"a key of somebody else's", others.token(soon, "temporal-system:admin", "default:admin"), denied, "TEMPORAL_API_KEY"},
		{"a key whose time is over", keys.token(time.Now().Add(-time.Hour), "default:admin"), denied, "TEMPORAL_API_KEY"},
		{"a key for another namespace", keys.token(soon, "other:admin"), denied, "TEMPORAL_API_KEY"},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, said := say(changed(good, map[string]string{"TEMPORAL_API_KEY": c.key}), "list")
			if code != c.code || !strings.Contains(said, c.says) {
				t.Errorf("exit status %d, not %d; %q is not in:\n%s", code, c.code, c.says, said)
			}
			if c.key != "" && strings.Contains(said, c.key) {
				t.Error("it shows the key")
			}
			t.Log(said)
		})
	}
}

func TestAClusterThatWantsCertificates(t *testing.T) {
	top := newTopology(t)
	certs := filepath.Join(top.dir, "certs")
	if err := os.Mkdir(certs, 0o755); err != nil {
		t.Fatal(err)
	}
	ours, others := newAuthority(t, certs, "ours"), newAuthority(t, certs, "others")
	soon := time.Now().Add(time.Hour)
	ours.leaf("server", soon)
	ours.leaf("client", soon)
	ours.leaf("expired", time.Now().Add(-time.Hour))
	others.leaf("stranger", soon)
	top.secureCluster(certs, "TEMPORAL_TLS_REQUIRE_CLIENT_AUTH=true",
		"TEMPORAL_TLS_CLIENT1_CA_CERT="+filepath.Join(certs, "ours.pem"), "TEMPORAL_TLS_CLIENT2_CA_CERT="+filepath.Join(certs, "ours.pem"))
	say := top.teller(certs)
	good := map[string]string{"TEMPORAL_TLS_CERT": "client.pem", "TEMPORAL_TLS_KEY": "client.key", "TEMPORAL_TLS_CA": "ours.pem"}
	top.until("namespace create", 2*time.Minute, func() error {
		if code, said := say(good, "namespace", "create"); code != 0 {
			return fmt.Errorf("%d: %s", code, said)
		}
		return nil
	})

	const denied, unreachable = 4, 8
	for _, c := range []struct {
		name string
		env  map[string]string // beside the good ones; "" takes one away
		code int
		says string // besides what went wrong, the setting
	}{
		{"everything as it should be", nil, 0, "no run yet"},
		{"the name that the server proves", map[string]string{"TEMPORAL_TLS_SERVER_NAME": "temporal.test"}, 0, "no run yet"},
		{"no certificate", map[string]string{"TEMPORAL_TLS_CERT": "", "TEMPORAL_TLS_KEY": ""}, denied, "Set TEMPORAL_TLS_CERT and TEMPORAL_TLS_KEY"},
		{"no TLS at all", map[string]string{"TEMPORAL_TLS_CERT": "", "TEMPORAL_TLS_KEY": "", "TEMPORAL_TLS_CA": ""}, denied, "wants TLS"},
		{"no authority", map[string]string{"TEMPORAL_TLS_CA": ""}, denied, "Check TEMPORAL_TLS_CA"},
		{"another authority", map[string]string{"TEMPORAL_TLS_CA": "others.pem"}, denied, "Check TEMPORAL_TLS_CA"},
		{"an authority that is none", map[string]string{"TEMPORAL_TLS_CA": "client.key"}, 2, "TEMPORAL_TLS_CA: no certificate"},
		{"another name", map[string]string{"TEMPORAL_TLS_SERVER_NAME": "elsewhere.test"}, denied, "Check TEMPORAL_TLS_SERVER_NAME"},
		{"a certificate of another authority", map[string]string{"TEMPORAL_TLS_CERT": "stranger.pem", "TEMPORAL_TLS_KEY": "stranger.key"}, denied, "Check TEMPORAL_TLS_CERT"},
		{"an expired certificate", map[string]string{"TEMPORAL_TLS_CERT": "expired.pem", "TEMPORAL_TLS_KEY": "expired.key"}, denied, "TEMPORAL_TLS_CERT expired on"},
		{"a certificate without its key", map[string]string{"TEMPORAL_TLS_KEY": ""}, 2, "only one of TEMPORAL_TLS_CERT and TEMPORAL_TLS_KEY"},
		{"a certificate with another's key", map[string]string{"TEMPORAL_TLS_KEY": "server.key"}, 2, "TEMPORAL_TLS_CERT, TEMPORAL_TLS_KEY"},
		{"an unknown namespace", map[string]string{"TEMPORAL_NAMESPACE": "nowhere"}, 3, "TEMPORAL_NAMESPACE"},
		{"nobody there", map[string]string{"TEMPORAL_ADDRESS": "127.0.0.1:1"}, unreachable, "TEMPORAL_ADDRESS"},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, said := say(changed(good, c.env), "list")
			if code != c.code || !strings.Contains(said, c.says) {
				t.Errorf("exit status %d, not %d; %q is not in:\n%s", code, c.code, c.says, said)
			}
			t.Log(said)
		})
	}
}
