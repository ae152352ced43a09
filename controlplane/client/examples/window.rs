//! Writes a column of a matrix into a window elsewhere, hears of it, reads a
//! row back and makes a tensor of the window.
//!
//!     cargo run --example window -- /run/genie/agent.sock

use std::error::Error;
use std::time::Duration;

use genie_client::{Batch, Client, Dtype, Listener, Memory, Run, TensorInfo};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let socket = args.next().unwrap_or("/run/genie/agent.sock".into());
    run(&socket, args.next().as_deref(), &socket)
}

/// Runs the example; `there` is the socket of the agent that has the window.
pub fn run(socket: &str, node: Option<&str>, there: &str) -> Result<(), Box<dyn Error>> {
    const ROWS: u64 = 64;
    const ROW: u64 = 256;
    let mut listener = Listener::connect(there, "cache")?;
    let mut client = Client::connect(socket)?;
    let arena = client.arena(1 << 20, Memory::Auto)?;
    let column = arena.tensor("column", Dtype::U8, &[ROWS, 4])?;
    column.write(0, &[7; 4 * ROWS as usize]);

    // Four bytes of each row: one request, whatever lies between them stays.
    let window = client.create_window(node, "cache/layer0", ROWS * ROW, Memory::Auto)?;
    let mut batch = Batch::write();
    let fourth = Run {
        offset: 16,
        len: 4,
        stride: ROW,
        count: ROWS,
    };
    batch.run(&window, fourth, &column, 0)?;
    batch.notify(&window, b"column 4")?;
    let posted = client.post(&batch)?;
    let moved = client.wait(posted)?;
    assert_eq!((moved.bytes, moved.listeners), (4 * ROWS, 1));

    let heard = listener.next(Duration::from_secs(10))?;
    let heard = heard.ok_or("no notification came")?;
    assert_eq!(
        (&heard.name[..], &heard.message[..]),
        ("cache/layer0", &b"column 4"[..])
    );

    let row = arena.tensor("row", Dtype::U8, &[ROW])?;
    let mut batch = Batch::read();
    batch.range(&window, 3 * ROW..4 * ROW, &row, 0)?;
    client.run(&batch)?;
    let mut bytes = [1; ROW as usize];
    row.read(0, &mut bytes);
    assert_eq!(
        (&bytes[..16], &bytes[16..20], bytes[20]),
        (&[0; 16][..], &[7; 4][..], 0)
    );

    // From here on nobody can change it.
    let info = TensorInfo {
        name: "keys".into(),
        dtype: Dtype::U8,
        shape: vec![ROWS, ROW],
    };
    client.seal(&window, vec![(info, 0)])?;
    let keys = client.open(node, "cache/layer0/keys")?;
    println!(
        "{} bytes of {} over {}",
        keys.len_bytes(),
        keys.info.name,
        moved.path
    );
    client.remove(node, "cache/layer0")?;
    Ok(())
}
