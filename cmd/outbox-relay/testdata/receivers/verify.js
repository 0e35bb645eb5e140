// Has the official libraries judge requests: node verify.js FILE SECONDS, of one request a line, see TestOfficialVerifiers, and the time at which they came.
// It prints how often each of them accepted a request and refused a tampered copy, and what they judged wrongly.
import assert from 'node:assert/strict'
import { createPublicKey, verify as verifySignature } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { createInterface } from 'node:readline'
import * as octokit from '@octokit/webhooks-methods'
import { HTTP } from 'cloudevents'
import * as standardwebhooks from 'standardwebhooks'
import * as svix from 'svix'

const [file, seconds] = process.argv.slice(2)
Date.now = () => 1000 * seconds // what is older than five minutes is refused, and judging takes longer where little of a processor is left

// Each throws, or returns false, unless it accepts the request. Bodies are given as the libraries want them: octokit takes strings alone.
const webhook = ({ Webhook }) => ({ headers, body }, token) => {
  const library = token.startsWith('whsec_') ? new Webhook(token) : new Webhook(Buffer.from(token), { format: 'raw' })
  library.verify(body, headers)
  return true
}
const verifiers = {
  v1: { standardwebhooks: webhook(standardwebhooks), svix: webhook(svix) },
  legacy: { octokit: ({ headers, body }, token, { signatureHeader }) => octokit.verify(token, body.toString(), headers[signatureHeader]) },
  // No official library reads v1a: Node's own ed25519, as its specification says.
  v1a: {
    'node:crypto': ({ headers, body }, token) => {
      const head = Buffer.from('302a300506032b6570032100', 'hex') // an ed25519 key follows, says RFC 8410
      const key = createPublicKey({ key: Buffer.concat([head, Buffer.from(token.slice('whpk_'.length), 'base64')]), format: 'der', type: 'spki' })
      const signed = Buffer.concat([Buffer.from(`${headers['webhook-id']}.${headers['webhook-timestamp']}.`), body])
      return headers['webhook-signature'].split(' ').map((one) => one.split(','))
        .some(([scheme, signature]) => scheme === 'v1a' && verifySignature(null, signed, key, Buffer.from(signature, 'base64')))
    },
  },
}

function isCloudEvent ({ headers, body }, { event }) {
  const got = HTTP.toEvent({ headers, body: body.toString() })
  got.validate() // which toEvent leaves to its user
  const read = headers['ce-id'] ? decodeURIComponent : String // the library leaves that to its user as well
  assert.deepEqual([got.id, read(got.source), read(got.type), got.subject, got.specversion], [event.id, event.source, event.type, event.subject, '1.0'])
  assert.equal(Date.parse(got.time), Date.parse(event.time))
  const data = JSON.parse(event.data)
  if (data === Object(data)) assert.deepEqual(got.data, data) // the library itself changes other values
  return true
}

const counts = {}
const wrong = []

async function judge (name, what, expected, accepts) {
  let accepted
  let reason = 'it is not accepted'
  try {
    accepted = await accepts()
  } catch (error) {
    accepted = false
    reason = error.message
  }
  if (accepted !== expected) wrong.push(`${name}, ${what}: ${accepted ? 'accepted' : reason}`)
  counts[name] ??= {}
  counts[name][what] = (counts[name][what] ?? 0) + 1
}

for await (const line of createInterface({ input: createReadStream(file) })) {
  const request = JSON.parse(line)
  for (const { what, headers, body } of request.copies) {
    const copy = { headers: { ...request.headers, ...headers }, body: Buffer.from(body ?? request.body, 'base64') }
    for (const { scheme, token, expired } of request.keys) {
      if (scheme === 'legacy' && (what === 'id' || what === 'timestamp')) continue // it signs the body alone
      const name = expired && what === 'request' ? 'expired secret' : what
      for (const [library, accepts] of Object.entries(verifiers[scheme])) {
        await judge(library, name, name === 'request', () => accepts(copy, token, request))
      }
    }
  }
  if (request.event) {
    const whole = { headers: request.headers, body: Buffer.from(request.body, 'base64') }
    await judge('cloudevents', 'request', true, () => isCloudEvent(whole, request))
    const { 'ce-type': _, ...headers } = request.headers // no type is no CloudEvent
    const body = Buffer.from(whole.body.toString().replace('"type":', '"kind":'))
    await judge('cloudevents', 'without a type', false, () => isCloudEvent(headers['ce-id'] ? { headers, body: whole.body } : { headers, body }, request))
  }
}
console.log(JSON.stringify({ counts, wrong: wrong.slice(0, 20), wrongs: wrong.length }))
