package delivery

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
)

// TLSVersion is the least version of TLS that is spoken: "1.2" or "1.3". Empty: that of the section for a profile, and 1.2 for the section.
type TLSVersion string

func (v TLSVersion) number() (n uint16, ok bool) {
	switch v {
	case "", "1.2":
		return tls.VersionTLS12, true
	case "1.3":
		return tls.VersionTLS13, true
	}
	return 0, false
}

// TLS says how receivers are spoken to over TLS. The mapstructure tags are the names of the keys below delivery.tls.
type TLS struct {
	TLSSettings `mapstructure:",squash"`
	// Profiles are for endpoints that need something else.
	Profiles []TLSProfile `mapstructure:"profiles"`
}

// TLSSettings name files in PEM form. They are read when a Client is made, and again once they have changed; what cannot be used then leaves what there was
// in use.
type TLSSettings struct {
	MinVersion TLSVersion `mapstructure:"min_version"`
	// CAFile has the certificates of authorities that are trusted besides the system's; with CAOnly, instead of these. Empty: the system's.
	CAFile string `mapstructure:"ca_file"`
	CAOnly bool   `mapstructure:"ca_only"`
	// CertFile has the client certificate and the chain that leads to its authority, KeyFile its key. It is shown to every receiver that asks for one.
	// Empty: none.
	CertFile string `mapstructure:"cert_file"`
	KeyFile  string `mapstructure:"key_file"`
}

// TLSProfile is what the endpoints of a tenant have instead, or one of them. What it leaves out is as for all others: the version, CAFile with CAOnly,
// CertFile with KeyFile.
type TLSProfile struct {
	// Tenant is the name of its schema. Endpoint is the id of one of its endpoints; empty: all that have no profile of their own.
	Tenant   string `mapstructure:"tenant"`
	Endpoint string `mapstructure:"endpoint"`
	// ServerName is asked for (SNI), and has to be in the receiver's certificate, instead of the host of the endpoint's URL.
	ServerName  string `mapstructure:"server_name"`
	TLSSettings `mapstructure:",squash"`
}

// over returns the settings with what they leave out taken from base.
func (s TLSSettings) over(base TLSSettings) TLSSettings {
	s.MinVersion = cmp.Or(s.MinVersion, base.MinVersion)
	if s.CAFile == "" {
		s.CAFile, s.CAOnly = base.CAFile, base.CAOnly
	}
	if s.CertFile == "" {
		s.CertFile, s.KeyFile = base.CertFile, base.KeyFile
	}
	return s
}

// files lists those that there are.
func (s TLSSettings) files() (list []string) {
	for _, name := range []string{s.CAFile, s.CertFile, s.KeyFile} {
		if name != "" {
			list = append(list, name)
		}
	}
	return list
}

// ClientCertificate is one that receivers are shown.
type ClientCertificate struct {
	File, Subject string
	Until         time.Time
}

// ClientCertificates reads those of the section and its profiles, each file once.
func (t *TLS) ClientCertificates() ([]ClientCertificate, error) {
	var list []ClientCertificate
	for _, s := range append([]TLSSettings{t.TLSSettings}, settingsOf(t.Profiles)...) {
		if s.CertFile == "" || slices.ContainsFunc(list, func(c ClientCertificate) bool { return c.File == s.CertFile }) {
			continue
		}
		_, chain, err := certificates("cert_file", s.CertFile)
		if err != nil {
			return nil, err
		}
		list = append(list, ClientCertificate{s.CertFile, chain[0].Subject.String(), chain[0].NotAfter})
	}
	return list, nil
}

func settingsOf(profiles []TLSProfile) (list []TLSSettings) {
	for _, p := range profiles {
		list = append(list, p.TLSSettings)
	}
	return list
}

const tlsKey = "delivery.tls"

func profileKeyword(i int) string { return tlsKey + ".profiles[" + strconv.Itoa(i) + "]" }

// validate also reads the files.
func (t *TLS) validate(f *faults) {
	t.TLSSettings.validate(tlsKey, f)
	owners := map[profileKey]string{}
	for i, p := range t.Profiles {
		key := profileKeyword(i)
		if p.Tenant == "" {
			f.add(key+".tenant", "", "is missing: name the schema of the tenant")
		}
		endpoint, err := p.endpoint()
		if err != nil {
			f.add(key+".endpoint", strconv.Quote(p.Endpoint), "is no id of an endpoint: write one such as 0190a5b2-7c1d-7e3f-8a4b-5c6d7e8f9a0b, or leave it out for all of the tenant")
		}
		if p.ServerName != "" && (!validHostPattern(p.ServerName) || strings.HasPrefix(p.ServerName, "*")) {
			f.add(key+".server_name", strconv.Quote(p.ServerName), "is no host name: write one such as hooks.example.com")
		}
		of := profileKey{p.Tenant, endpoint}
		if other := owners[of]; other != "" && err == nil {
			f.add(key, "", "is for the same endpoints as "+other+": drop one of the two")
		}
		owners[of] = key
		p.validate(key, f)
	}
}

func (p *TLSProfile) endpoint() (outbox.UUID, error) {
	if p.Endpoint == "" {
		return outbox.UUID{}, nil
	}
	return outbox.ParseUUID(p.Endpoint)
}

func (s TLSSettings) validate(key string, f *faults) {
	if _, ok := s.MinVersion.number(); !ok {
		f.add(key+".min_version", strconv.Quote(string(s.MinVersion)), "must be 1.2 or 1.3")
	}
	if s.CAOnly && s.CAFile == "" {
		f.add(key+".ca_only", "true", "needs ca_file: without it no receiver would be trusted")
	}
	switch {
	case s.CertFile != "" && s.KeyFile == "":
		f.add(key+".key_file", "", "is missing: cert_file is of no use without its key")
	case s.CertFile == "" && s.KeyFile != "":
		f.add(key+".cert_file", "", "is missing: key_file is of no use without its certificate")
	}
	for _, read := range []func() error{
		func() error { _, err := s.roots(); return err },
		func() error { _, err := s.pair(); return err },
	} {
		if bad, ok := errors.AsType[*fileError](read()); ok {
			f.add(key+"."+bad.key, strconv.Quote(bad.file), bad.err.Error())
		}
	}
}

// fileError is a file that cannot be used. It never holds any of what is in the file.
type fileError struct {
	key, file string
	err       error
}

func (e *fileError) Error() string { return fmt.Sprintf("%s %s: %v", e.key, e.file, e.err) }
func (e *fileError) Unwrap() error { return e.err }

func readFile(key, name string) ([]byte, error) {
	text, err := os.ReadFile(name) //nolint:gosec // the operator names it
	if err != nil {
		cause := new(fs.PathError)
		if errors.As(err, &cause) {
			err = cause.Err // the name is said anyway
		}
		return nil, &fileError{key, name, fmt.Errorf("cannot be read: %w", err)}
	}
	return text, nil
}

// certificates parses all of a file's.
func certificates(key, name string) (text []byte, list []*x509.Certificate, err error) {
	if text, err = readFile(key, name); err != nil {
		return nil, nil, err
	}
	rest := text
	for block, left := pem.Decode(rest); block != nil; block, left = pem.Decode(rest) {
		rest = left
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, nil, &fileError{key, name, fmt.Errorf("its certificate %d cannot be read: %w", len(list)+1, err)}
		}
		list = append(list, cert)
	}
	if len(list) == 0 || bytes.Contains(rest, []byte("-----BEGIN")) { // the latter: somebody is writing it, or it was cut off
		return nil, nil, &fileError{key, name, errors.New("holds no certificate in PEM form, or one that breaks off: -----BEGIN CERTIFICATE----- …")}
	}
	return text, list, nil
}

// roots reads the authorities that are trusted; nil: the system's.
func (s TLSSettings) roots() (*x509.CertPool, error) {
	const key = "ca_file"
	if s.CAFile == "" {
		return nil, nil //nolint:nilnil // as tls.Config has it
	}
	_, list, err := certificates(key, s.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !s.CAOnly {
		if pool, err = x509.SystemCertPool(); err != nil {
			return nil, &fileError{key, s.CAFile, fmt.Errorf("is to be added to the system's authorities, which cannot be read: set ca_only: %w", err)}
		}
	}
	for _, cert := range list {
		pool.AddCert(cert)
	}
	return pool, nil
}

// pair reads the client certificate; nil: there is none.
func (s TLSSettings) pair() (*tls.Certificate, error) {
	if s.CertFile == "" || s.KeyFile == "" {
		return nil, nil //nolint:nilnil // there is none
	}
	cert, _, err := certificates("cert_file", s.CertFile)
	if err != nil {
		return nil, err
	}
	key, err := readFile("key_file", s.KeyFile)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	switch {
	case err == nil:
		return &pair, nil
	case strings.Contains(err.Error(), "does not match"):
		return nil, &fileError{"key_file", s.KeyFile, errors.New("is not the key of the certificate in cert_file")}
	case bytes.Contains(key, []byte("ENCRYPTED")):
		return nil, &fileError{"key_file", s.KeyFile, errors.New("is encrypted: take its passphrase off, and let nobody else read it")}
	default:
		return nil, &fileError{"key_file", s.KeyFile, errors.New("holds no private key in PEM form that can be used: -----BEGIN PRIVATE KEY----- …")}
	}
}
