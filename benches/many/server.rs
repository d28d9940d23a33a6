//! The scripted server, as a process.

use std::{
    io::BufRead,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use vlmnarrate_scripted_server::{Capacity, Server, Slots};

use crate::{Result, processor_time};

/// Prints the URL, then answers `reset` and `report` from standard input until its end.
pub fn run(settings: &str) -> Result<()> {
    let settings: Value = serde_json::from_str(settings)?;
    let number = |name: &str| settings[name].as_u64().ok_or(format!("no {name}"));
    let slots = Slots::new(Capacity {
        slots: number("slots")? as usize,
        delay: Duration::from_nanos(number("delay_ns")?),
        tokens: number("tokens")? as u32,
        queue_limit: None,
    });
    let server = Server::builder().keep(0).start(slots.handler());
    println!("{}", json!(server.url()));
    let mut began = (Instant::now(), processor_time());
    for ask in std::io::stdin().lock().lines() {
        if ask? == "reset" {
            slots.reset();
            began = (Instant::now(), processor_time());
            println!("null");
            continue;
        }
        let counters = slots.counters();
        let arrivals = counters.arrivals.iter();
        let arrivals: Vec<_> = arrivals
            .map(|at| at.saturating_duration_since(began.0).as_micros() as u64)
            .collect();
        let report = json!({
            "seconds": began.0.elapsed().as_secs_f64(),
            "cpu": processor_time() - began.1,
            "served": counters.served,
            "cancelled": counters.cancelled,
            "in_flight_max": counters.in_flight_max,
            "connections": server.accepted(),
            "arrivals": arrivals,
        });
        println!("{report}");
    }
    Ok(())
}
