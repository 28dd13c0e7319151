// Package payload keeps what Temporal stores of a run unreadable to whoever
// can read its database: every payload is sealed with AES-256-GCM before it
// leaves this process.
package payload

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"strings"

	commonpb "go.temporal.io/api/common/v1"
	"go.temporal.io/sdk/converter"
	"go.temporal.io/sdk/temporal"
	"google.golang.org/protobuf/proto"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Variable is the setting that the keys come from.
const Variable = "SANDBOX_TEMPORAL_PAYLOAD_KEY"

// The metadata of a sealed payload.
const (
	encodingKey = "encoding"
	encoding    = "binary/encrypted"
	cipherKey   = "encryption-cipher"
	cipherName  = "AES-256-GCM"
	keyIDKey    = "encryption-key-id"
)

// Keys seal and open payloads. The first key seals; each opens what it sealed,
// so a key is rotated by putting a new one before it.
type Keys struct {
	sealing string
	token   string
	ciphers map[string]cipher.AEAD
}

var _ converter.PayloadCodec = (*Keys)(nil)

const keyHint = "Write it as ID:KEY with a KEY of 32 random bytes in base64 (head -c32 /dev/urandom | base64), and older ones behind commas."

// Parse reads keys as ID:BASE64, separated by commas. Without any it returns
// nil, which seals nothing.
func Parse(text string) (*Keys, error) {
	if text == "" {
		return nil, nil //nolint:nilnil // no keys: nothing is sealed
	}
	k := &Keys{ciphers: map[string]cipher.AEAD{}}
	// No error may quote the text: it is a secret.
	for one := range strings.SplitSeq(text, ",") {
		id, encoded, ok := strings.Cut(strings.TrimSpace(one), ":")
		if !ok || id == "" {
			return nil, fault.New("", fault.Invalid, "%s has a key without an id", Variable).Hinted(keyHint)
		}
		key, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil || len(key) != 32 {
			return nil, fault.New("", fault.Invalid, "the key %q of %s is not 32 bytes in base64", id, Variable).Hinted(keyHint)
		}
		if k.ciphers[id] != nil {
			return nil, fault.New("", fault.Invalid, "%s has two keys with the id %q", Variable, id).Hinted(keyHint)
		}
		block, err := aes.NewCipher(key)
		if err != nil {
			return nil, fault.New("payload key", fault.Internal, "%w", err)
		}
		if k.ciphers[id], err = cipher.NewGCM(block); err != nil {
			return nil, fault.New("payload key", fault.Internal, "%w", err)
		}
		if k.sealing == "" {
			k.sealing = id
			mac := hmac.New(sha256.New, key)
			mac.Write([]byte("sandbox-temporal codec endpoint"))
			k.token = hex.EncodeToString(mac.Sum(nil)[:16])
		}
	}
	return k, nil
}

// Converter returns the data converter of every Temporal client of this
// program. That of a nil k is the SDK's own, but says of a sealed payload
// which setting it lacks.
func (k *Keys) Converter() converter.DataConverter {
	if k == nil {
		return converter.NewCodecDataConverter(converter.GetDefaultDataConverter(), keyless{})
	}
	return converter.NewCodecDataConverter(converter.GetDefaultDataConverter(), k)
}

// keyless is the codec of whoever has no keys.
type keyless struct{}

func (keyless) Encode(payloads []*commonpb.Payload) ([]*commonpb.Payload, error) {
	return payloads, nil
}

func (keyless) Decode(payloads []*commonpb.Payload) ([]*commonpb.Payload, error) {
	for _, p := range payloads {
		if m := p.GetMetadata(); string(m[encodingKey]) == encoding {
			return nil, fault.New("open payload", fault.Denied, "it was sealed with the key %q, and %s is not set", m[keyIDKey], Variable).
				Hinted("Set it to the keys that the run was sealed with, here and for the engine or worker.")
		}
	}
	return payloads, nil
}

// FailureConverter is the same for errors, whose text and stack trace would
// else be stored as they are.
func (k *Keys) FailureConverter() converter.FailureConverter {
	return temporal.NewDefaultFailureConverter(temporal.DefaultFailureConverterOptions{
		DataConverter: k.Converter(), EncodeCommonAttributes: k != nil,
	})
}

// Encode implements converter.PayloadCodec.
func (k *Keys) Encode(payloads []*commonpb.Payload) ([]*commonpb.Payload, error) {
	out := make([]*commonpb.Payload, len(payloads))
	aead := k.ciphers[k.sealing]
	for i, p := range payloads {
		plain, err := proto.Marshal(p)
		if err != nil {
			return nil, fault.New("seal payload", fault.Internal, "%w", err)
		}
		nonce := make([]byte, aead.NonceSize(), aead.NonceSize()+len(plain)+aead.Overhead())
		rand.Read(nonce) // it crashes the program rather than fail
		out[i] = &commonpb.Payload{
			Metadata: map[string][]byte{encodingKey: []byte(encoding), cipherKey: []byte(cipherName), keyIDKey: []byte(k.sealing)},
			Data:     aead.Seal(nonce, nonce, plain, []byte(k.sealing)),
		}
	}
	return out, nil
}

// Decode implements converter.PayloadCodec. What was not sealed is passed on:
// a run may be older than the key.
func (k *Keys) Decode(payloads []*commonpb.Payload) ([]*commonpb.Payload, error) {
	const op = "open payload"
	out := make([]*commonpb.Payload, len(payloads))
	for i, p := range payloads {
		if string(p.GetMetadata()[encodingKey]) != encoding {
			out[i] = p
			continue
		}
		id := string(p.Metadata[keyIDKey])
		aead := k.ciphers[id]
		if aead == nil {
			return nil, fault.New(op, fault.Denied, "it was sealed with the key %q, which %s does not have", id, Variable).
				Hinted("Put it back, behind the key that is used now.")
		}
		if len(p.Data) < aead.NonceSize() {
			return nil, fault.New(op, fault.Denied, "it is too short")
		}
		plain, err := aead.Open(nil, p.Data[:aead.NonceSize()], p.Data[aead.NonceSize():], []byte(id))
		if err != nil {
			return nil, fault.New(op, fault.Denied, "it was changed, or sealed with another key that is called %q", id).Hinted("Check %s.", Variable)
		}
		out[i] = &commonpb.Payload{}
		if err := proto.Unmarshal(plain, out[i]); err != nil {
			return nil, fault.New(op, fault.Internal, "%w", err)
		}
	}
	return out, nil
}
