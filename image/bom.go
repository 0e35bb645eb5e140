package main

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"runtime/debug"
	"strings"
)

// bomType is the media type of CycloneDX in JSON.
const bomType = "application/vnd.cyclonedx+json"

// The part of CycloneDX 1.6 that there is something to say in: https://cyclonedx.org/docs/1.6/json/
type (
	bom struct {
		Format       string       `json:"bomFormat"`
		SpecVersion  string       `json:"specVersion"`
		SerialNumber string       `json:"serialNumber"`
		Version      int          `json:"version"`
		Metadata     metadata     `json:"metadata"`
		Components   []component  `json:"components"`
		Dependencies []dependency `json:"dependencies"`
	}
	metadata struct {
		Component component `json:"component"`
	}
	component struct {
		Type    string `json:"type"`
		Ref     string `json:"bom-ref"`
		Name    string `json:"name"`
		Version string `json:"version"`
		PURL    string `json:"purl"`
		Hashes  []hash `json:"hashes,omitempty"`
		// Licences has the texts: they go where the binary goes.
		Licences []licence `json:"licenses,omitempty"`
	}
	licence struct {
		Named named `json:"license"`
	}
	named struct {
		ID   string     `json:"id,omitempty"`   // of SPDX
		Name string     `json:"name,omitempty"` // where SPDX has none
		Text attachment `json:"text"`
	}
	attachment struct {
		ContentType string `json:"contentType"`
		Content     string `json:"content"`
	}
	hash struct {
		Algorithm string `json:"alg"`
		Content   string `json:"content"`
	}
	dependency struct {
		Ref       string   `json:"ref"`
		DependsOn []string `json:"dependsOn"`
	}
)

// billOfMaterials lists what is linked into a binary, which the binary itself knows best. It has no time and no random number in it: the same binary gives the
// same bytes.
//
// licences are those of modules by their paths. One that is not allowed, or that is missing, is an error.
func billOfMaterials(version string, binary []byte, licences map[string][]licence) ([]byte, error) {
	info, err := buildinfo.Read(bytes.NewReader(binary))
	if err != nil {
		return nil, fmt.Errorf("read what the binary is made of: %w", err)
	}
	digest := sha256.Sum256(binary)
	sum := digest
	sum[6], sum[8] = sum[6]&0x0f|0x80, sum[8]&0x3f|0x80 // a UUID of version 8, of the binary's making
	self := library(info.Main.Path, version)
	self.Type = "application"
	self.Hashes = []hash{{"SHA-256", hex.EncodeToString(digest[:])}}
	b := bom{
		Format: "CycloneDX", SpecVersion: "1.6", Version: 1,
		SerialNumber: fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16]),
		Metadata:     metadata{self},
		Components:   []component{library("std", strings.TrimPrefix(info.GoVersion, "go"))},
	}
	for _, m := range info.Deps {
		b.Components = append(b.Components, library(linked(m)))
	}
	all := dependency{Ref: self.Ref}
	for i := range b.Components {
		c := &b.Components[i]
		c.Licences = licences[c.Name]
		all.DependsOn = append(all.DependsOn, c.Ref)
	}
	b.Dependencies = []dependency{all}
	if err := b.check(); err != nil {
		return nil, err
	}
	out, err := json.MarshalIndent(b, "", " ")
	if err != nil {
		return nil, fmt.Errorf("write the bill of materials: %w", err)
	}
	return append(out, '\n'), nil
}

// linked is the module that is there, which may stand for another.
func linked(m *debug.Module) (path, version string) {
	if m.Replace != nil {
		m = m.Replace
	}
	return m.Path, m.Version
}

func library(path, version string) component {
	purl := "pkg:golang/" + path + "@" + strings.ReplaceAll(version, "+", "%2B")
	return component{Type: "library", Ref: purl, Name: path, Version: version, PURL: purl}
}
