// The unmodified SDK of E2B against our server: what the Go test in
// internal/sandbox/e2b/e2btest runs. Each call that holds says so in one line;
// the first that does not ends the program.
import assert from 'node:assert/strict'
import { Sandbox, CommandExitError, FileNotFoundError, FileType, FilesystemEventType, RateLimitError, SandboxNotFoundError, ServiceBusyError, TimeoutError } from 'e2b'

async function check(what, f) {
  let timer
  try {
    const late = new Promise((_, reject) => { timer = setTimeout(() => reject(new Error('it takes too long')), 180_000) })
    const result = await Promise.race([f(), late])
    console.log(`ok ${what}`)
    return result
  } catch (err) {
    console.log(`FAILED ${what}`)
    console.log(err)
    process.exit(1)
  } finally {
    clearTimeout(timer)
  }
}

// until waits for what comes by itself.
async function until(what, f) {
  for (const end = Date.now() + 60_000; Date.now() < end;) {
    if (await f()) return
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  throw new Error(`waited in vain: ${what}`)
}

async function all(paginator) {
  const items = []
  while (paginator.hasNext) items.push(...await paginator.nextItems())
  return items
}

const metadata = { run: 'r 1/a&b=c', created: '2026-11-28T22:00:00+01:00', fork: '1' }
const ids = (list) => list.map((s) => s.sandboxId).sort()

// The control plane.
const sbx = await check('create', async () => {
  const s = await Sandbox.create('base', { metadata, envs: { SANDBOX_WIDE: 'yes' }, timeoutMs: 120_000 })
  assert.match(s.sandboxId, /^i[0-9a-z]+$/)
  return s
})
await check('create: unknown template', () => assert.rejects(Sandbox.create('no-such-template'), /404/))
const other = await check('create a second', () => Sandbox.create({ metadata: { run: 'another' }, timeoutMs: 600_000 }))
await check('list all', async () => assert.deepEqual(ids(await all(Sandbox.list())), ids([sbx, other])))
await check('list by metadata', async () => {
  const [found, ...rest] = await all(Sandbox.list({ query: { metadata } }))
  assert.equal(rest.length, 0)
  assert.equal(found.sandboxId, sbx.sandboxId)
  assert.deepEqual(found.metadata, metadata)
  assert.equal(found.state, 'running')
  assert.ok(found.endAt > found.startedAt)
})
await check('list by state', async () => assert.deepEqual(await all(Sandbox.list({ query: { state: ['paused'] } })), []))
await check('list in pages', async () => {
  const pages = Sandbox.list({ limit: 1 })
  assert.equal((await pages.nextItems()).length, 1)
  assert.ok(pages.hasNext)
  assert.equal((await pages.nextItems()).length, 1)
  assert.ok(!pages.hasNext)
})
await check('getInfo', async () => {
  const info = await sbx.getInfo()
  assert.equal(info.sandboxId, sbx.sandboxId)
  assert.deepEqual(info.metadata, metadata)
})
await check('setTimeout', async () => {
  await sbx.setTimeout(600_000)
  const left = (await sbx.getInfo()).endAt - Date.now()
  assert.ok(left > 500_000 && left <= 600_000, `${left} ms are left`)
})
await check('connect extends and never shortens', async () => {
  await Sandbox.connect(sbx.sandboxId, { timeoutMs: 1_000 })
  assert.ok((await sbx.getInfo()).endAt - Date.now() > 500_000)
})
await check('connect to nothing', () => assert.rejects(Sandbox.connect('inosuchsandbox'), SandboxNotFoundError))
await check('isRunning', async () => assert.equal(await sbx.isRunning(), true))
await check('a limit on the rate is waited for', async () => (await Sandbox.create({ metadata: { planned: 'rate' } })).kill())
await check('a limit on the number is an error', () => assert.rejects(Sandbox.create({ metadata: { planned: 'full' } }), RateLimitError))

// Commands.
await check('commands.run', async () => {
  const r = await sbx.commands.run('echo out; echo err >&2; echo $SANDBOX_WIDE $ONE; pwd; id -un', { envs: { ONE: 'a b' } })
  assert.equal(r.exitCode, 0)
  assert.equal(r.stdout, 'out\nyes a b\n/home/user\nuser\n')
  assert.equal(r.stderr, 'err\n')
})
await check('commands.run as root elsewhere', async () => {
  const r = await sbx.commands.run('id -un; pwd', { user: 'root', cwd: '/tmp' })
  assert.equal(r.stdout, 'root\n/tmp\n')
})
await check('commands.run fails', () => assert.rejects(sbx.commands.run('echo why >&2; exit 3'), (err) => err instanceof CommandExitError && err.exitCode === 3 && err.stderr === 'why\n'))
await check('commands.run: no such folder', () => assert.rejects(sbx.commands.run('true', { cwd: '/not/there' }), /does not exist/))
await check('commands.run: no such user', () => assert.rejects(sbx.commands.run('true', { user: 'nobody-here' })))
await check('commands.run says much', async () => {
  let heard = 0
  const r = await sbx.commands.run('head -c 3000000 /dev/zero | tr "\\0" x', { onStdout: (text) => { heard += text.length } })
  assert.equal(r.stdout.length, 3_000_000)
  assert.equal(heard, 3_000_000)
})
await check('a timeout ends the command', async () => {
  await assert.rejects(sbx.commands.run('sleep 1111', { timeoutMs: 300 }), TimeoutError)
  await until('the command to be gone', async () => (await sbx.commands.list()).length === 0)
})
const background = await check('commands.run in the background', () => sbx.commands.run('echo started; cat; echo over; exit 4', { background: true, stdin: true, timeoutMs: 0 }))
await check('commands.list', async () => {
  const [p, ...rest] = await sbx.commands.list()
  assert.equal(rest.length, 0)
  assert.equal(p.pid, background.pid)
  assert.equal(p.cmd, '/bin/bash')
  assert.deepEqual(p.args, ['-l', '-c', 'echo started; cat; echo over; exit 4'])
})
await check('commands.sendStdin', async () => {
  await sbx.commands.sendStdin(background.pid, 'hello\n')
  await until('the echo', () => background.stdout === 'started\nhello\n')
})
await check('commands.connect', async () => {
  const again = await sbx.commands.connect(background.pid, { timeoutMs: 0 })
  await sbx.commands.sendStdin(background.pid, 'twice\n')
  await until('both hear it', () => background.stdout.endsWith('twice\n') && again.stdout === 'twice\n')
  await again.disconnect()
})
await check('commands.closeStdin and wait', async () => {
  await sbx.commands.closeStdin(background.pid)
  await assert.rejects(background.wait(), (err) => err instanceof CommandExitError && err.exitCode === 4 && err.stdout.endsWith('over\n'))
})
await check('commands.connect after the end', async () => {
  const late = await sbx.commands.connect(background.pid)
  await assert.rejects(late.wait(), (err) => err.exitCode === 4)
})
await check('commands.kill', async () => {
  const p = await sbx.commands.run('exec sleep 1111', { background: true })
  assert.equal(await sbx.commands.kill(p.pid), true)
  await assert.rejects(p.wait(), /killed/)
  assert.equal(await sbx.commands.kill(p.pid), false)
})
await check('disconnect lets a command live', async () => {
  const p = await sbx.commands.run('sleep 1111', { background: true, timeoutMs: 0 })
  await p.disconnect()
  assert.deepEqual((await sbx.commands.list()).map((x) => x.pid), [p.pid])
  assert.equal(await p.kill(), true)
})

// Terminals.
await check('pty', async () => {
  let said = ''
  const decoder = new TextDecoder()
  const pty = await sbx.pty.create({ cols: 91, rows: 31, onData: (data) => { said += decoder.decode(data, { stream: true }) }, timeoutMs: 0 })
  await sbx.pty.sendInput(pty.pid, new TextEncoder().encode('stty size; test -t 1 && echo ter""minal\n'))
  await until('its size', () => said.includes('31 91') && said.includes('terminal'))
  await sbx.pty.resize(pty.pid, { cols: 70, rows: 20 })
  await sbx.pty.sendInput(pty.pid, new TextEncoder().encode('stty size\n'))
  await until('its new size', () => said.includes('20 70'))
  await sbx.pty.sendInput(pty.pid, new TextEncoder().encode('exit 0\n'))
  assert.equal((await pty.wait()).exitCode, 0)
})

// Files.
await check('files.write and read', async () => {
  const info = await sbx.files.write('/workspace/deep/a file.txt', 'ümläut\n')
  assert.equal(info.path, '/workspace/deep/a file.txt')
  assert.equal(info.type, FileType.FILE)
  assert.equal(await sbx.files.read('/workspace/deep/a file.txt'), 'ümläut\n')
})
await check('files.write replaces, also with nothing', async () => {
  await sbx.files.write('/workspace/deep/a file.txt', '')
  assert.equal(await sbx.files.read('/workspace/deep/a file.txt'), '')
})
await check('files.write and read of bytes', async () => {
  const bytes = new Uint8Array(2_000_000).map((_, i) => i % 251)
  await sbx.files.write('bytes', bytes.buffer)
  assert.deepEqual(await sbx.files.read('bytes', { format: 'bytes' }), bytes)
  assert.equal((await sbx.files.getInfo('/home/user/bytes')).size, 2_000_000)
})
await check('files.write of a stream, compressed', async () => {
  await sbx.files.write('stream', new Blob(['streamed']).stream(), { gzip: true })
  assert.equal(await sbx.files.read('stream', { gzip: true }), 'streamed')
})
await check('files.write of several', async () => {
  const infos = await sbx.files.write([{ path: '/workspace/1', data: 'one' }, { path: '/workspace/sub/2', data: 'two' }])
  assert.deepEqual(infos.map((i) => i.path), ['/workspace/1', '/workspace/sub/2'])
  assert.equal(await sbx.files.read('/workspace/sub/2'), 'two')
})
await check('files.read of nothing', () => assert.rejects(sbx.files.read('/workspace/none'), FileNotFoundError))
await check('files.read of a folder', () => assert.rejects(sbx.files.read('/workspace'), /directory/))
await check('files.makeDir', async () => {
  assert.equal(await sbx.files.makeDir('/workspace/new/dir'), true)
  assert.equal(await sbx.files.makeDir('/workspace/new/dir'), false)
})
await check('files.list', async () => {
  const entries = await sbx.files.list('/workspace')
  assert.deepEqual(entries.map((e) => [e.name, e.type]).sort(), [['1', 'file'], ['deep', 'dir'], ['new', 'dir'], ['sub', 'dir']])
  const deeper = await sbx.files.list('/workspace', { depth: 2 })
  assert.deepEqual(deeper.map((e) => e.path).sort(), ['/workspace/1', '/workspace/deep', '/workspace/deep/a file.txt', '/workspace/new', '/workspace/new/dir', '/workspace/sub', '/workspace/sub/2'])
})
await check('files.getInfo', async () => {
  await sbx.commands.run('chmod 640 /workspace/1; ln -s /workspace/1 /home/user/link')
  const info = await sbx.files.getInfo('/workspace/1')
  assert.equal(info.size, 3)
  assert.equal(info.mode, 0o640)
  assert.equal(info.permissions, '-rw-r-----')
  assert.equal(info.owner, 'user')
  assert.ok(Math.abs(info.modifiedTime - Date.now()) < 600_000)
  const link = await sbx.files.getInfo('link')
  assert.equal(link.type, FileType.FILE) // what it leads to, as with E2B
  assert.equal(link.symlinkTarget, '/workspace/1')
})
await check('files.exists', async () => {
  assert.equal(await sbx.files.exists('/workspace/1'), true)
  assert.equal(await sbx.files.exists('/workspace/none'), false)
})
await check('files.rename', async () => {
  const info = await sbx.files.rename('/workspace/1', '/workspace/moved')
  assert.equal(info.path, '/workspace/moved')
  assert.equal(await sbx.files.exists('/workspace/1'), false)
  await assert.rejects(sbx.files.rename('/workspace/1', '/workspace/x'), FileNotFoundError)
})
await check('files.remove', async () => {
  await sbx.files.remove('/workspace/deep')
  assert.equal(await sbx.files.exists('/workspace/deep'), false)
  await sbx.files.remove('/workspace/deep')
})
await check('files.watchDir', async () => {
  const seen = []
  const watch = await sbx.files.watchDir('/workspace', (e) => { seen.push(`${e.type} ${e.name}`) }, { recursive: true })
  await sbx.files.write('/workspace/watched', 'x')
  await until('a create and a write', () => seen.includes(`${FilesystemEventType.CREATE} watched`) && seen.includes(`${FilesystemEventType.WRITE} watched`))
  await sbx.files.makeDir('/workspace/fresh')
  await until('a folder', () => seen.includes(`${FilesystemEventType.CREATE} fresh`))
  await sbx.files.remove('/workspace/watched')
  await until('a remove', () => seen.includes(`${FilesystemEventType.REMOVE} watched`))
  await watch.stop()
})
await check('uploadUrl and downloadUrl', async () => {
  const form = new FormData()
  form.append('file', new Blob(['by url']), 'by-url')
  const up = await fetch(await sbx.uploadUrl('/workspace/by-url', { useSignatureExpiration: 60 }), { method: 'POST', body: form })
  assert.equal(up.status, 200)
  const url = await sbx.downloadUrl('/workspace/by-url')
  assert.equal(await (await fetch(url)).text(), 'by url')
  const forged = new URL(url)
  forged.searchParams.set('path', '/etc/passwd')
  assert.notEqual((await fetch(forged)).status, 200)
})
await check('files are those that commands see', async () => {
  await sbx.commands.run('echo made > /tmp/by-command')
  assert.equal(await sbx.files.read('/tmp/by-command'), 'made\n')
  assert.equal((await sbx.commands.run('cat /workspace/moved')).stdout, 'one')
})
await check('git', async () => {
  await sbx.git.init('/workspace/repo')
  await sbx.git.configureUser('A', 'a@example.com', { scope: 'local', path: '/workspace/repo' })
  await sbx.files.write('/workspace/repo/file', 'text')
  await sbx.git.add('/workspace/repo')
  await sbx.git.commit('/workspace/repo', 'first')
  assert.equal((await sbx.git.status('/workspace/repo')).isClean, true)
})

// Two sandboxes are two.
await check('sandboxes do not see each other', async () => {
  assert.equal(await other.files.exists('/workspace/moved'), false)
  assert.equal((await other.commands.run('ls /home/user')).stdout, '')
})

// Life.
await check('pause and connect', async () => {
  const p = await sbx.commands.run('i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.01; done', { background: true, timeoutMs: 0 })
  const heard = p.wait().then(() => 'ended', () => 'cut')
  await until('it counts', () => sbx.files.exists('/tmp/count'))
  assert.equal(await sbx.pause(), true)
  assert.equal(await heard, 'cut')
  assert.equal(await sbx.pause(), false)
  assert.equal(await sbx.isRunning(), false)
  await assert.rejects(sbx.commands.run('true'), SandboxNotFoundError)
  assert.deepEqual(ids(await all(Sandbox.list({ query: { state: ['paused'] } }))), [sbx.sandboxId])
  assert.equal((await sbx.getInfo()).state, 'paused')
  await sbx.connect()
  assert.equal(await sbx.isRunning(), true)
  const before = Number(await sbx.files.read('/tmp/count'))
  await until('it goes on', async () => Number(await sbx.files.read('/tmp/count')) > before)
  assert.equal(await sbx.commands.kill(p.pid), true)
})
const snapshot = await check('createSnapshot', async () => {
  const s = await sbx.createSnapshot()
  assert.ok(s.snapshotId)
  assert.equal(await sbx.isRunning(), true)
  return s
})
await check('listSnapshots', async () => assert.deepEqual((await all(sbx.listSnapshots())).map((s) => s.snapshotId), [snapshot.snapshotId]))
await check('create from a snapshot', async () => {
  await sbx.files.write('/workspace/moved', 'changed since')
  const s = await Sandbox.create(snapshot.snapshotId)
  assert.equal(await s.files.read('/workspace/moved'), 'one')
  assert.equal((await s.commands.run('ls -l /workspace/moved | cut -d " " -f 3')).stdout, 'user\n')
  assert.equal(await s.kill(), true)
})
await check('deleteSnapshot', async () => {
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), false)
  await assert.rejects(Sandbox.create(snapshot.snapshotId), /404/)
})
await check('fork', async () => {
  const forks = await sbx.fork({ count: 3, timeoutMs: 300_000 })
  assert.equal(forks.length, 3)
  assert.ok(forks[1] instanceof ServiceBusyError, 'the one that was to fail')
  for (const f of [forks[0], forks[2]]) {
    assert.notEqual(f.sandboxId, sbx.sandboxId)
    assert.equal(await f.files.read('/workspace/moved'), 'changed since')
    assert.deepEqual((await f.getInfo()).metadata, metadata)
    await f.files.write('/workspace/moved', f.sandboxId)
  }
  assert.equal(await sbx.files.read('/workspace/moved'), 'changed since')
  assert.equal(await forks[0].files.read('/workspace/moved'), forks[0].sandboxId)
  assert.equal((await all(Sandbox.list({ query: { metadata } }))).length, 3)
  for (const f of [forks[0], forks[2]]) assert.equal(await f.kill(), true)
})
await check('getMetrics', async () => assert.ok(Array.isArray(await sbx.getMetrics())))
await check('kill', async () => {
  assert.equal(await sbx.kill(), true)
  assert.equal(await sbx.kill(), false)
  assert.equal(await sbx.isRunning(), false)
  assert.equal(await other.kill(), true)
  assert.deepEqual(await all(Sandbox.list()), [])
})
console.log('all ok')
