package egress

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"time"
)

// maxHello is more than any client's first message has.
const maxHello = 64 << 10

var errHello = errors.New("the hello was read")

// readHello reads the first message of a TLS client and returns the server
// that it names, in lower case, and the bytes that were read, which the server
// still has to get. The connection is not answered.
func readHello(ctx context.Context, from io.Reader) (name string, read []byte, err error) {
	var seen bytes.Buffer
	conn := &listening{from: io.TeeReader(io.LimitReader(from, maxHello), &seen)}
	found := false
	err = tls.Server(conn, &tls.Config{
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			name, found = strings.ToLower(strings.TrimSuffix(h.ServerName, ".")), true
			return nil, errHello
		},
	}).HandshakeContext(ctx)
	if !found {
		return "", seen.Bytes(), err
	}
	return name, seen.Bytes(), nil
}

// A listening connection hears and says nothing.
type listening struct{ from io.Reader }

func (l *listening) Read(p []byte) (int, error)     { return l.from.Read(p) }
func (*listening) Write(p []byte) (int, error)      { return len(p), nil }
func (*listening) Close() error                     { return nil }
func (*listening) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (*listening) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (*listening) SetDeadline(time.Time) error      { return nil }
func (*listening) SetReadDeadline(time.Time) error  { return nil }
func (*listening) SetWriteDeadline(time.Time) error { return nil }
